//! The final table and metrics.json.

use std::path::Path;

use serde_json::{Value, json};

use crate::Fallible;
use crate::evaluate::{RankingMetrics, RecommendedMetrics};
use crate::objective::Objective;
use crate::train::{EpochPoint, best_epoch};

/// A run that is over.
pub struct Finished<'a> {
    pub objective: &'a Objective,
    pub seed: u64,
    pub curve: Vec<EpochPoint>,
    pub ranking: RankingMetrics,
    pub recommended: RecommendedMetrics,
}

const COLUMNS: [&str; 8] =
    ["Recall@10", "Recall@20", "Recall@100", "NDCG@10", "NDCG@20", "MRR", "popularity", "coverage"];

fn row(ranking: &RankingMetrics, recommended: &RecommendedMetrics) -> [f64; 8] {
    [
        ranking.recall_at_10,
        ranking.recall_at_20,
        ranking.recall_at_100,
        ranking.ndcg_at_10,
        ranking.ndcg_at_20,
        ranking.mrr,
        recommended.popularity,
        recommended.coverage,
    ]
}

/// Prints a line for each objective, averaged over seeds, and one for the baseline.
pub fn print_table(runs: &[Finished<'_>], baseline: &(RankingMetrics, RecommendedMetrics)) {
    let seeds = by_objective(runs).map(<[_]>::len).max().unwrap_or(0);
    let spread = if seeds > 1 { format!(", mean ± standard deviation over {seeds} seeds") } else { String::new() };
    println!("\nTest targets ranked over the whole catalogue{spread}");
    let names = by_objective(runs).map(|runs| runs[0].objective.name.len());
    let table = Table { name_width: names.chain([14]).max().unwrap_or(0), width: if seeds > 1 { 18 } else { 12 } };
    table.print_header();
    for runs in by_objective(runs) {
        let rows: Vec<[f64; 8]> = runs.iter().map(|run| row(&run.ranking, &run.recommended)).collect();
        let epochs: Vec<String> = runs.iter().map(|run| (best_epoch(&run.curve) + 1).to_string()).collect();
        let fewer = if runs.len() < seeds { format!(" ({} of {seeds} seeds)", runs.len()) } else { String::new() };
        table.print_row(&runs[0].objective.name, &rows, &format!("{}{fewer}", epochs.join(",")));
    }
    table.print_row("most popular", &[row(&baseline.0, &baseline.1)], "");
}

/// Two lines on what is to be seen in the table.
pub fn print_reading(validated: bool) {
    println!(
        "\nAs a rule, in-batch negatives with logQ come near to the full softmax; without it they rank popular items \
         too low, and may do worse than \"most popular\"."
    );
    let tested = if validated {
        "The table tests the epoch with the best validation NDCG@10"
    } else {
        "The table tests the last epoch, as there is no --validation file"
    };
    println!("{tested}. Each loss has a scale of its own, corrected logQ above all: compare metrics, not losses.");
}

/// The runs of each objective, which follow one another.
pub fn by_objective<'r, 'a>(runs: &'r [Finished<'a>]) -> impl Iterator<Item = &'r [Finished<'a>]> {
    runs.chunk_by(|a, b| a.objective == b.objective)
}

/// How wide the columns are.
struct Table {
    name_width: usize,
    width: usize,
}

impl Table {
    fn print_header(&self) {
        let Table { name_width, width } = *self;
        println!("{:>name_width$}{}  epoch", "", COLUMNS.map(|name| format!("{name:>width$}")).concat());
    }

    fn print_row(&self, name: &str, rows: &[[f64; 8]], epochs: &str) {
        let Table { name_width, width } = *self;
        let cells = std::array::from_fn::<String, 8, _>(|column| {
            let (mean, deviation) = mean_and_deviation(rows.iter().map(|row| row[column]));
            // Popularity is a count of interactions, the others are shares.
            let digits = if COLUMNS[column] == "popularity" { 1 } else { 4 };
            let spread = if rows.len() > 1 { format!(" ± {deviation:.digits$}") } else { String::new() };
            format!("{:>width$}", format!("{mean:.digits$}{spread}"))
        });
        println!("{name:>name_width$}{}  {epochs}", cells.concat());
    }
}

/// Mean and sample standard deviation (0 for a single value).
fn mean_and_deviation(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    let squares: f64 = values.map(|x| (x - mean).powi(2)).sum();
    (mean, (squares / f64::max(n - 1.0, 1.0)).sqrt())
}

/// Everything in the table and the curves, one entry per run.
pub fn write_json(
    path: &Path,
    data: &str,
    runs: &[Finished<'_>],
    baseline: &(RankingMetrics, RecommendedMetrics),
) -> Fallible<()> {
    let metrics = |ranking: &RankingMetrics, recommended: &RecommendedMetrics| -> Value {
        COLUMNS.into_iter().zip(row(ranking, recommended)).map(|(name, x)| (name.to_string(), json!(x))).collect()
    };
    let run = |run: &Finished<'_>| {
        let epochs: Vec<Value> = run.curve.iter().map(epoch).collect();
        json!({
            "loss": run.objective.name,
            "seed": run.seed,
            "best_epoch": best_epoch(&run.curve) + 1,
            "test": metrics(&run.ranking, &run.recommended),
            "epochs": epochs,
        })
    };
    let all = json!({
        "data": data,
        "runs": runs.iter().map(run).collect::<Vec<_>>(),
        "most_popular": metrics(&baseline.0, &baseline.1),
    });
    std::fs::write(path, format!("{all:#}\n")).map_err(|e| format!("{}: {e}", path.display()).into())
}

fn epoch(point: &EpochPoint) -> Value {
    json!({
        "train_loss": point.train_loss,
        "temperature": point.temperature,
        "validation Recall@10": point.validation.map(|validation| validation.recall_at_10),
        "validation NDCG@10": point.validation.map(|validation| validation.ndcg_at_10),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_is_the_sample_s() {
        assert_eq!(mean_and_deviation([1.0, 2.0, 3.0].into_iter()), (2.0, 1.0));
        assert_eq!(mean_and_deviation([4.0].into_iter()), (4.0, 0.0));
    }
}
