"""The guide's chart from a situation to negatives and a correction."""

from guide_svg import LEFT_PAD, line, page, text

QUESTIONS = [
    ("Are images and texts paired,", "each as frequent as any other?",
     "in-batch, symmetric, no correction", "Batch::in_batch, Loss::symmetric / InfoNCELoss(symmetric=True)"),
    ("Is the catalogue small enough to", "score all of it in each step?",
     "full softmax, no correction", "Batch::builder or of_table / FullSoftmaxLoss"),
    ("Has each query negatives of its own", "(SASRec, mined hard negatives)?",
     "negatives by row of the table", "RowNegatives / row_negatives; with log_q if a sampler drew them"),
    ("Are rare items in hardly any batch,", "and does Recall@100 matter?",
     "in-batch and uniform pools, one log_q", "two pools, union_log_q, LogQNegativesOnly"),
]
OTHERWISE = ("in-batch with logQ", "log_q from counts or GapEstimator, CorrectedLogQ or LogQ")

LEFT, WIDE, RIGHT, ANSWER, HEIGHT, STEP = LEFT_PAD, 270, 350, 480, 52, 84


def box(x, y, width, lines, fill, bold=False):
    yield (
        f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="8" fill="{fill}" stroke="#888"/>'
    )
    for place, words in enumerate(lines):
        weight = 'font-weight="bold"' if bold and place == 0 else ""
        yield text(x + width / 2, y + 21 + 19 * place, words, "middle", weight)


def arrow(x1, y1, x2, y2, word):
    yield line(x1, y1, x2, y2, "#555", 1.5)
    dx, dy = (1, 0) if y1 == y2 else (0, 1)
    tip = [(x2, y2), (x2 - 8 * dx - 5 * dy, y2 - 8 * dy - 5 * dx), (x2 - 8 * dx + 5 * dy, y2 - 8 * dy + 5 * dx)]
    yield f'<polygon points="{" ".join(f"{x},{y}" for x, y in tip)}" fill="#555"/>'
    yield text((x1 + x2) / 2 + 12 * dy, (y1 + y2) / 2 - 6 * dx + 4 * dy, word, "middle" if dx else "start")


def decision():
    parts, y = [], 16
    for first, second, answer, call in QUESTIONS:
        middle = y + HEIGHT / 2
        parts += box(LEFT, y, WIDE, (first, second), "#eef3fa")
        parts += arrow(LEFT + WIDE, middle, RIGHT, middle, "yes")
        parts += box(RIGHT, y, ANSWER, (answer, call), "#eef8ee", bold=True)
        parts += arrow(LEFT + WIDE / 2, y + HEIGHT, LEFT + WIDE / 2, y + STEP, "no")
        y += STEP
    parts += box(LEFT, y, RIGHT + ANSWER - LEFT, OTHERWISE, "#eef8ee", bold=True)
    return page(RIGHT + ANSWER + LEFT_PAD, y + HEIGHT + 16, parts)
