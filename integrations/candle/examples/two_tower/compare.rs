//! The metrics as a table, and beside those that the Rust example wrote.

use std::path::Path;

use serde_json::Value;

use crate::Fallible;
use crate::evaluate::RankingMetrics;

const NAMES: [&str; 6] = ["Recall@10", "Recall@20", "Recall@100", "NDCG@10", "NDCG@20", "MRR"];
/// Both examples sum in different orders, so a target may move a place now and then: one of the 6000 generated users is
/// 0.00017 of Recall. A temperature of 0.08 in place of 0.07 moves NDCG@10 of one epoch with logQ by 0.0007 (2026-11-30),
/// a learning rate of 0.15 in place of 0.2 by 0.0005, and another seed by 0.0025.
const ROUNDING: f64 = 2e-4;

fn values(metrics: &RankingMetrics) -> [f64; 6] {
    let RankingMetrics { recall_at_10, recall_at_20, recall_at_100, ndcg_at_10, ndcg_at_20, mrr } = *metrics;
    [recall_at_10, recall_at_20, recall_at_100, ndcg_at_10, ndcg_at_20, mrr]
}

fn print_row(name: &str, values: &[f64; 6]) {
    println!("{name:>22}{}", values.map(|x| format!("{x:>12.4}")).concat());
}

pub fn print(tested: &[(String, RankingMetrics)]) {
    println!("\n{:>22}{}", "", NAMES.map(|name| format!("{name:>12}")).concat());
    for (name, metrics) in tested {
        print_row(name, &values(metrics));
    }
}

/// Prints what train_two_tower's metrics.json has of the same losses and seed, and fails where it is not the same.
pub fn with_file(path: &Path, seed: u64, tested: &[(String, RankingMetrics)]) -> Fallible<()> {
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let runs = file["runs"].as_array().ok_or("no runs in the file; rule: metrics.json of train_two_tower")?;
    println!("\ntrain_two_tower, {}", path.display());
    let mut differing = Vec::new();
    for (name, metrics) in tested {
        let run = runs.iter().find(|run| run["loss"] == **name && run["seed"] == seed);
        let run = run.ok_or_else(|| format!("{} has no run of {name} with seed {seed}", path.display()))?;
        let theirs = NAMES.map(|metric| run["test"][metric].as_f64().unwrap_or(f64::NAN));
        print_row(name, &theirs);
        for ((metric, ours), theirs) in NAMES.into_iter().zip(values(metrics)).zip(theirs) {
            // A NaN is near nothing.
            let near = (ours - theirs).abs() <= ROUNDING;
            if !near {
                differing.push(format!("{name}: {metric} is {ours}, of train_two_tower {theirs}"));
            }
        }
    }
    match differing.is_empty() {
        true => Ok(()),
        false => Err(format!("metrics differ by more than {ROUNDING}\n{}", differing.join("\n")).into()),
    }
}
