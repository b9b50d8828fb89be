//! Trains a two-tower recommender and compares softmax losses over the whole catalogue.
//!
//! ```text
//! cargo run --release --example train_two_tower                          # generated data, every loss
//! cargo run --release --example train_two_tower -- --data FILE --seeds 1,2,3
//! cargo run --release --example train_two_tower -- --help
//! ```
//!
//! `FILE` holds `user_id,item_id,timestamp` lines, plain or gzipped; ids are any text, timestamps whole numbers.
//!
//! - **Targets.** An interaction counts where a user takes an item for the first time; repeats are dropped and counted
//!   in the output. The last item of each user is the test target, the one before it the validation target, the earlier
//!   ones are training targets, each predicted from what the user took before it. Users of fewer than three distinct
//!   items are trained on only. Interactions at the same time keep the order of the file.
//! - **Towers.** Items: rows of a table. Queries: the user's last K items, pooled, through a small learned layer
//!   (`model.rs`). Cosine similarity over a temperature that is fixed, scheduled or learned.
//! - **Losses.** Names in `objective.rs`; or pools of negatives of your choice in one loss, as in
//!   `--negatives in-batch,uniform:4096,queue:16384 --log-q streaming` (`negatives.rs`, `frequencies.rs`). Each step is one
//!   call of [`Backend::compute`](catalog_softmax::Backend::compute) (`candidates.rs`).
//! - **Optimiser.** Row-wise Adagrad: a step costs what the rows that it touches cost (`parameter.rs`).
//! - **Result.** Recall@10, Recall@100, NDCG@10 and MRR of the test targets among all items that the user had not
//!   taken before, mean popularity (training interactions) and coverage of the ten items recommended to each user, and
//!   for comparison the ranking by popularity alone. Beside the table: `curves.svg`, `metrics.json` and checkpoints.
//! - **Serving.** `--index hnsw` retrieves the test users' items through an approximate index and compares it with the
//!   exact search (`index.rs`); with `--resume` it does so for checkpoints that are there already. `docs/serving.md` loads
//!   a checkpoint in Python.
//!
//! The same seed gives bitwise the same result, and so does a run that was interrupted and goes on with `--resume`.

mod candidates;
mod checkpoint;
mod curves;
mod data;
mod evaluate;
mod frequencies;
mod generate;
mod index;
mod model;
mod negatives;
mod objective;
mod options;
mod parameter;
mod report;
mod sampler;
mod split;
mod temperature;
mod train;
mod union;

use std::process::ExitCode;
use std::time::Instant;

use catalog_softmax::{Backend, Device};
use clap::Parser;

use data::Sequences;
use objective::Objective;
use options::{DeviceChoice, Options};
use report::Finished;
use split::Split;
use train::Run;

/// Any error reaches the user as its message.
type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Fallible<()> {
    options.check()?;
    let objectives = options.objectives()?;
    let start = Instant::now();
    let mut backend = open_backend(options.device)?;
    let (sequences, description) = sequences(options)?;
    println!("data: {description}");
    let mut split = Split::new(sequences)?;
    if let Some(users) = options.evaluate {
        split.sample_held_out(users);
    }
    println!(
        "      {} users, {} items, {} training examples, {} test targets (each user's last new item)",
        split.num_users(),
        split.num_items(),
        split.train.len(),
        split.test.len()
    );
    std::fs::create_dir_all(&options.out).map_err(|e| format!("--out {}: {e}", options.out.display()))?;

    let runs = train_all(&split, options, &objectives, &mut *backend)?;
    let baseline = (
        evaluate::rank_by_popularity(&split, &mut *backend)?,
        evaluate::recommended_by_popularity(&split, &mut *backend)?,
    );
    report::print_table(&runs, &baseline, options.seed.len());
    println!("\nmean popularity of the test targets themselves: {:.1}", evaluate::target_popularity(&split));
    report::write_json(&options.out.join("metrics.json"), &description, &runs, &baseline)?;
    curves::draw(&options.out.join("curves.svg"), &runs)?;
    println!(
        "wrote metrics.json, curves.svg and checkpoints to {} after {:.0} s",
        options.out.display(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn open_backend(choice: DeviceChoice) -> Fallible<Box<dyn Backend<Real = f32>>> {
    let device = match choice {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda => Device::Cuda(0),
        DeviceChoice::Auto => {
            let selected = Device::auto();
            if let Some(reason) = &selected.no_gpu {
                println!("device: {} ({reason})", selected.device);
            }
            selected.device
        }
    };
    let backend = device.open()?;
    if choice != DeviceChoice::Auto || device != Device::Cpu {
        println!("device: {device}");
    }
    Ok(backend)
}

/// The data with a line about them.
fn sequences(options: &Options) -> Fallible<(Sequences, String)> {
    let Some(path) = &options.data else {
        let (users, items) = (options.generate_users, options.generate_items);
        return Ok((generate::sequences(users, items), generate::description(users, items)));
    };
    let loaded = data::read_file(path, options.skip_bad_lines)?;
    let mut description = format!(
        "{}: {} interactions, {} repeats of an earlier one dropped",
        path.display(),
        loaded.interactions,
        loaded.repeats
    );
    if options.skip_bad_lines {
        description += &format!(", {} bad lines skipped", loaded.bad_lines);
    }
    Ok((loaded.sequences, description))
}

/// Every loss asked for with every seed, each trained and tested.
fn train_all<'a>(
    split: &Split,
    options: &Options,
    objectives: &'a [Objective],
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<Vec<Finished<'a>>> {
    let mut runs = Vec::new();
    for objective in objectives {
        for &seed in &options.seed {
            let checkpoint = options.out.join(format!("{}-seed{seed}.safetensors", objective.file_stem()));
            let trained = Run { split, options, objective, seed }.train(backend, &checkpoint)?;
            if let Some(index) = options.index {
                let (history, out) = (options.history, &options.out);
                println!("{}", index::compare(&trained.model, split, history, index, out, backend)?);
            }
            runs.push(Finished {
                objective,
                seed,
                curve: trained.curve,
                ranking: evaluate::rank(&trained.model, split, &split.test, options.history, backend)?,
                recommended: evaluate::recommended(&trained.model, split, options.history, backend)?,
            });
        }
    }
    Ok(runs)
}
