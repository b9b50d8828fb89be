//! Trains a two-tower recommender and compares softmax losses over the whole catalogue.
//!
//! ```text
//! cargo run --release --example train_two_tower                          # generated data, every loss
//! cargo run --release --example train_two_tower -- --data FILE --seeds 1,2,3
//! cargo run --release --example train_two_tower -- --help
//! ```
//!
//! Files are of interactions: user, item and time in each line, as MovieLens, Amazon and Gowalla have them, plain or
//! gzipped. Columns are found by the names in the first line, or named by `--columns`; ids are any text.
//!
//! - **Targets.** An interaction counts where a user takes an item for the first time; repeats are dropped and counted
//!   in the output. Of `--data`, the last item of each user is the test target, the one before it the validation
//!   target, the earlier ones are training targets, each predicted from what the user took before it. Users of fewer
//!   than three distinct items are trained on only. Interactions at the same time keep the order of the file.
//! - **Given splits.** `--train FILE --test FILE` trains on all of one file and tests on all of the other: a user's
//!   query sees all of the user's training items, and its targets are all of the user's items in the test file
//!   (`split.rs`).
//! - **Towers.** Items: rows of a table. Queries: the user's last K items, pooled, through a small learned layer
//!   (`model.rs`). Cosine similarity over a temperature that is fixed, scheduled or learned.
//! - **Losses.** Names in `objective.rs`; or pools of negatives of your choice in one loss, as in `--negatives
//!   in-batch,uniform:4096,queue:16384 --log-q streaming` (`negatives.rs`, `frequencies.rs`); with `row-uniform:256`,
//!   negatives of each example's own. `--next` takes several of the next items as positives, and
//!   `--false-negative-margin` or `--false-negative-ratio` leaves out negatives that may be positives.
//! - **Steps.** A batch names rows of the item table and copies none of them. The loss, its gradients and the optimiser's
//!   step on the item table are one call of [`Backend::update`](catalog_softmax::Backend::update) (`candidates.rs`), so
//!   that the full softmax needs no gradient of the table's size. Only beside a queue the gradient is returned first.
//! - **Optimiser.** Row-wise Adagrad: a step costs what the rows that it touches cost (`parameter.rs`).
//! - **Result.** Recall@10, @20 and @100, NDCG@10 and @20 and MRR of the test targets among all items that the user had
//!   not taken before (`evaluate.rs`), mean popularity (training interactions) and coverage of the ten items
//!   recommended to each user, and for comparison the ranking by popularity alone. Tested is the model of the epoch
//!   with the best validation NDCG@10. Beside the table: `curves.svg`, `metrics.json` and checkpoints (`checkpoint.rs`
//!   says what is in them).
//! - **Serving.** `--index hnsw` retrieves the test users' items through an approximate index and compares it with the
//!   exact search (`index.rs`); with `--resume` it does so for checkpoints that are there already. `docs/serving.md` loads
//!   a checkpoint in Python.
//!
//! The same seed gives bitwise the same result, and so does a run that was stopped by Ctrl-C and goes on with
//! `--resume`.

mod candidates;
mod checkpoint;
mod curves;
mod data;
mod evaluate;
mod frequencies;
mod generate;
mod index;
mod interrupt;
mod memory;
mod model;
mod negatives;
mod numbers;
mod objective;
mod options;
mod parameter;
mod report;
mod sampler;
mod sizes;
mod split;
mod temperature;
mod train;
mod union;

#[cfg(test)]
mod end_to_end;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use catalog_softmax::{Backend, Device};
use clap::Parser;

use evaluate::Scorer;
use interrupt::Interrupted;
use objective::Objective;
use options::{DeviceChoice, Options};
use report::Finished;
use split::Split;
use train::Run;

/// Any error reaches the user as its message.
type Fallible<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let options = Options::parse();
    match interrupt::listen().and_then(|()| run(&options, &interrupt::ASKED)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if error.is::<Interrupted>() { ExitCode::from(interrupt::STATUS) } else { ExitCode::FAILURE }
        }
    }
}

fn run(options: &Options, interrupt: &AtomicBool) -> Fallible<()> {
    options.check()?;
    let objectives = options.objectives()?;
    check_folder(&options.out, options.resume)?;
    let start = Instant::now();
    let mut backend = open_backend(options.device)?;
    let (mut split, description) = load(options)?;
    println!("data: {description}");
    if let Some(users) = options.evaluate {
        split.sample_held_out(users);
    }
    println!(
        "      {} users, {} items, {} training examples, {} test targets of {} users",
        split.num_users(),
        split.num_items(),
        split.train.len(),
        split.test.targets.len(),
        split.test.queries.len()
    );
    sizes::check_training(options, &objectives, &split)?;
    std::fs::create_dir_all(&options.out).map_err(|e| format!("--out {}: {e}", options.out.display()))?;

    let (runs, stopped) = train_all(&split, options, &objectives, interrupt, &mut *backend);
    if !runs.is_empty() {
        report(&split, &description, &runs, options, &mut *backend)?;
        println!(
            "wrote metrics.json, curves.svg and checkpoints to {} after {:.0} s",
            options.out.display(),
            start.elapsed().as_secs_f64()
        );
    }
    // What is finished is reported, whatever came after it.
    stopped.map_or(Ok(()), Err)
}

/// Refuses to write over what an earlier run left.
fn check_folder(out: &Path, resume: bool) -> Fallible<()> {
    let Ok(entries) = std::fs::read_dir(out) else { return Ok(()) };
    let of_run = |name: &str| name.ends_with(".safetensors") || name == "metrics.json";
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    match names.iter().find(|name| of_run(name)) {
        Some(name) if !resume => Err(format!(
            "--out {} holds {name} of an earlier run; rule: --resume to go on from there, or another --out",
            out.display()
        )
        .into()),
        _ => Ok(()),
    }
}

fn report(
    split: &Split,
    description: &str,
    runs: &[Finished<'_>],
    options: &Options,
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<()> {
    let baseline = (
        evaluate::rank(Scorer::Popularity, split, &split.test, backend)?,
        evaluate::recommended(Scorer::Popularity, split, backend)?,
    );
    report::print_table(runs, &baseline);
    println!("\nmean popularity of the test targets themselves: {:.1}", evaluate::target_popularity(split));
    report::print_reading(!split.validation.is_empty());
    report::write_json(&options.out.join("metrics.json"), description, runs, &baseline)?;
    curves::draw(&options.out.join("curves.svg"), runs)
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

/// The data with some lines about them.
fn load(options: &Options) -> Fallible<(Split, String)> {
    let format = options.format();
    if let Some(path) = &options.data {
        let (sequences, description) = data::read_file(path, &format)?;
        return Ok((Split::new(sequences)?, description));
    }
    if let (Some(train), Some(test)) = (&options.train, &options.test) {
        let (given, description) = data::read_given(train, options.validation.as_deref(), test, &format)?;
        return Ok((Split::given(given)?, description));
    }
    sizes::check_generated(options)?;
    let (users, items) = (options.generate_users, options.generate_items);
    Ok((Split::new(generate::sequences(users, items))?, generate::description(users, items)))
}

/// Every loss asked for with every seed, each trained and tested; and why there are no more of them.
fn train_all<'a>(
    split: &Split,
    options: &Options,
    objectives: &'a [Objective],
    interrupt: &AtomicBool,
    backend: &mut dyn Backend<Real = f32>,
) -> (Vec<Finished<'a>>, Option<Box<dyn Error>>) {
    let mut runs = Vec::new();
    for objective in objectives {
        for &seed in &options.seeds {
            match train_one(Run { split, options, objective, seed, interrupt }, backend) {
                Ok((curve, ranking, recommended)) => {
                    runs.push(Finished { objective, seed, curve, ranking, recommended });
                }
                Err(error) => return (runs, Some(error)),
            }
        }
    }
    (runs, None)
}

/// Trains, and tests the model of the best epoch.
fn train_one(
    run: Run<'_>,
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<(Vec<train::EpochPoint>, evaluate::RankingMetrics, evaluate::RecommendedMetrics)> {
    let Run { split, options, objective, seed, .. } = run;
    let checkpoint = options.out.join(format!("{}-seed{seed}.safetensors", objective.file_stem()));
    let trained = run.train(backend, &checkpoint)?;
    if let Some(index) = options.index {
        let (history, out) = (options.history, &options.out);
        println!("{}", index::compare(trained.best_model(), split, history, index, out, backend)?);
    }
    let scorer = Scorer::Model(trained.best_model(), options.history);
    let ranking = evaluate::rank(scorer, split, &split.test, backend)?;
    let recommended = evaluate::recommended(scorer, split, backend)?;
    Ok((trained.curve, ranking, recommended))
}
