//! What a run needs in memory, roughly and without overflow, so that absurd sizes are errors before anything is made.

use crate::memory;
use crate::objective::Objective;
use crate::options::Options;
use crate::split::Split;

/// Tables of generated data.
pub fn check_generated(options: &Options) -> Result<(), String> {
    // A user has up to 40 items of 4 bytes, in a list of its own; an item has a point of 8 coordinates and a name.
    let bytes = 200 * options.generate_users as u128 + 100 * options.generate_items as u128;
    let what = format!("data of {} users and {} items", options.generate_users, options.generate_items);
    memory::check(bytes, &what, "lower --generate-users or --generate-items")
}

/// Model, optimiser, candidates and checkpoint of the largest objective.
pub fn check_training(options: &Options, objectives: &[Objective], split: &Split) -> Result<(), String> {
    for objective in objectives {
        let bytes = training_bytes(options, objective, split);
        let what = format!("{} with --dim {} and {} items", objective.name, options.dim, split.num_items());
        memory::check(bytes, &what, "lower --dim, --batch or the sizes of --negatives")?;
    }
    Ok(())
}

fn training_bytes(options: &Options, objective: &Objective, split: &Split) -> u128 {
    let [items, dim] = [split.num_items(), options.dim].map(|n| n as u128);
    let batch = options.batch.min(split.train.len()) as u128;
    // Parameters once for training, once more for the best epoch, and as many bytes in a checkpoint before it is
    // written.
    let parameters = 4 * (2 * items * dim + dim * dim + dim);
    let models = parameters * if split.validation.is_empty() { 2 } else { 4 };
    // Rows of the item table are used where they are: beside their numbers and log_q, there are their gradients, and the
    // queue has embeddings of its own. The step of the full softmax takes neither.
    let [mut drawn, mut queued] = [0; 2];
    if let Some(negatives) = &objective.negatives {
        let times = |per_row: bool| if per_row { batch } else { 1 };
        drawn = batch + negatives.sampled.iter().map(|s| s.draws as u128 * times(s.per_row)).sum::<u128>();
        queued = negatives.queue.unwrap_or(0) as u128;
    }
    let candidates = drawn * 32 + drawn.min(items) * 8 * dim + queued * (4 * dim + 32);
    // Queries with what the query tower keeps of them, and positives.
    let positives = batch * options.next.min(items as usize) as u128;
    models + candidates + batch * (24 * dim + 24) + positives * (8 * dim + 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate;
    use clap::Parser;

    #[test]
    fn absurd_sizes_are_errors() {
        let split = Split::new(generate::sequences(60, 100)).unwrap();
        for flags in [
            &["--dim", "1000000000"][..],
            &["--dim", "4294967295", "--loss", "in-batch"],
            &["--negatives", "uniform:4000000000"],
            &["--negatives", "in-batch,queue:4294967295"],
            &["--negatives", "unigram:4294967295:1e308"],
        ] {
            let options = Options::try_parse_from(["train_two_tower"].iter().chain(flags)).unwrap();
            let error = check_training(&options, &options.objectives().unwrap(), &split).expect_err(&flags.join(" "));
            assert!(error.contains("GiB of memory; rule: the ") && error.contains("lower --dim"), "{error}");
        }
        // Batches are no longer than the data.
        let options = Options::parse_from(["train_two_tower", "--batch", "4294967295", "--history", "4294967295"]);
        check_training(&options, &options.objectives().unwrap(), &split).unwrap();
        for flags in [["--generate-users", "4294967295"], ["--generate-items", "4294967295"]] {
            let options = Options::parse_from(["train_two_tower"].iter().chain(&flags));
            assert!(check_generated(&options).unwrap_err().starts_with("data of "));
        }
    }
}
