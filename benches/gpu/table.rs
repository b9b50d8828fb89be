//! What the bench prints last: a markdown table for docs/benchmarks.md.

use super::shapes::{Device, Shape};

#[derive(Default)]
pub struct Table {
    rows: Vec<TableRow>,
}

struct TableRow {
    shape: Shape,
    pass: &'static str,
    name: &'static str,
    matmuls: f64,
    /// Ascending; warm-up included, since the first call of all is not among them.
    seconds: Vec<f64>,
}

impl TableRow {
    fn median(&self) -> f64 {
        let n = self.seconds.len();
        0.5 * (self.seconds[(n - 1) / 2] + self.seconds[n / 2])
    }
}

impl Table {
    pub fn add(&mut self, shape: Shape, pass: &'static str, name: &'static str, matmuls: f64, mut seconds: Vec<f64>) {
        // A filter on the command line leaves a function untimed.
        if !seconds.is_empty() {
            seconds.sort_by(f64::total_cmp);
            self.rows.push(TableRow { shape, pass, name, matmuls, seconds });
        }
    }

    pub fn print(&self, device: &Device) {
        println!(
            "\n{}: bf16, cosine, tau 0.05, log_q, Zipf ids; milliseconds of a call, median, least and largest sample;",
            device.name
        );
        println!(
            "TFLOP/s of the matmuls that each does (with gradients four, naive three); the floor's share of the median.\n"
        );
        println!(
            "| pass | B | N | D | function | median | min | max | TFLOP/s | floor, ms | share | bare matmul / this |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
        for row in &self.rows {
            let (median, Shape { b, n, d }) = (row.median(), row.shape);
            let bounds = [row.seconds[0], row.seconds[row.seconds.len() - 1]];
            let [median_ms, least, largest] =
                [median, bounds[0], bounds[1]].map(|seconds| format!("{:.3}", seconds * 1e3));
            let rate = row.matmuls * row.shape.flops() / median * 1e-12;
            let (floor, share) = match device.has_floor() {
                true => {
                    let floor = row.shape.floor(row.pass != "loss", device.multiprocessors);
                    (format!("{:.3}", floor * 1e3), format!("{:.0} %", 100.0 * floor / median))
                }
                false => ("-".into(), "-".into()),
            };
            let bare = self.rows.iter().find(|other| other.shape == row.shape && other.name == "bare_matmul");
            let ratio = bare.map_or("-".into(), |bare| format!("{:.2}", bare.median() / median));
            let (pass, name) = (row.pass.replace('_', " "), row.name);
            println!(
                "| {pass} | {b} | {n} | {d} | {name} | {median_ms} | {least} | {largest} | {rate:.1} | {floor} | {share} | {ratio} |"
            );
        }
    }
}
