use super::*;
use crate::data::{Given, Sequences};
use crate::frequencies::LogQ;
use crate::generate;
use catalog_softmax::{Correction, Cpu};
use clap::Parser;

static NEVER: AtomicBool = AtomicBool::new(false);

fn small_split() -> Split {
    Split::new(generate::sequences(60, 2000)).unwrap()
}

fn options(flags: &[&str]) -> Options {
    let small = ["train_two_tower", "--dim", "8", "--batch", "64"];
    Options::parse_from(small.iter().chain(flags))
}

fn run<'a>(split: &'a Split, options: &'a Options, objective: &'a Objective) -> Run<'a> {
    Run { split, options, objective, seed: 5, interrupt: &NEVER }
}

/// Trains with the first objective of the flags.
fn train(split: &Split, flags: &[&str], path: &Path) -> Result<Checkpoint, String> {
    let options = options(flags);
    let objective = &options.objectives().unwrap()[0];
    run(split, &options, objective).train(&mut Cpu::new(), path).map_err(|e| e.to_string())
}

/// The presets, two losses that leave something for later steps (a queue that wraps around, an estimator), and one with
/// negatives of a row's own.
fn objectives() -> Vec<Objective> {
    let new = |list: &str, log_q| Objective::new(list.parse().unwrap(), log_q, Correction::LogQ).unwrap();
    let several = new("in-batch,uniform:32,queue:100", LogQ::Streaming);
    let apart = new("unigram:32:0.5,log-uniform:32,queue:1000", LogQ::CountMin);
    let own = new("in-batch,row-uniform:16", LogQ::Exact);
    Objective::presets().into_iter().chain([several, apart, own]).collect()
}

#[test]
fn a_resumed_run_is_bitwise_the_uninterrupted_one() {
    let split = small_split();
    let folder = tempfile::tempdir().unwrap();
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    for objective in &objectives() {
        let train = |flags: &[&str], path: &Path| {
            let several = ["--learn-temperature", "--next", "2", "--false-negative-margin", "3"];
            let options = options(&[&several, flags].concat());
            run(&split, &options, objective).train(&mut Cpu::new(), path)
        };
        let uninterrupted = train(&["--epochs", "3"], &whole).unwrap();
        train(&["--epochs", "1"], &parts).unwrap();
        let resumed = train(&["--epochs", "3", "--resume"], &parts).unwrap();
        assert_eq!(uninterrupted.model, resumed.model, "{}", objective.name);
        assert_eq!(uninterrupted.curve, resumed.curve, "{}", objective.name);
        assert_eq!(std::fs::read(&whole).unwrap(), std::fs::read(&parts).unwrap());
    }
}

/// So many epochs at so high a rate overfit: the last one is not the best.
#[test]
fn the_model_of_the_best_epoch_is_kept() {
    let split = small_split();
    let folder = tempfile::tempdir().unwrap();
    let [whole, best, parts] = ["whole", "best", "parts"].map(|name| folder.path().join(name));
    let flags = ["--loss", "in-batch", "--learning-rate", "1", "--epochs"];
    let epochs = |n: &'static str| [&flags[..], &[n]].concat();
    let state = train(&split, &epochs("8"), &whole).unwrap();
    let ndcg = |point: &EpochPoint| point.validation.unwrap().ndcg_at_10;
    let epoch = best_epoch(&state.curve);
    assert!(epoch < 7 && state.curve.iter().all(|point| ndcg(point) <= ndcg(&state.curve[epoch])), "{:?}", state.curve);
    assert!(state.curve[..epoch].iter().all(|point| ndcg(point) < ndcg(&state.curve[epoch])));

    // It is what training no further returns.
    let until_then: &'static str = (epoch + 1).to_string().leak();
    let stopped = train(&split, &epochs(until_then), &best).unwrap();
    assert!(stopped.best.is_none());
    let values = |model: &Model| model.parameters().map(|(_, parameter)| parameter.values.clone());
    assert_eq!(values(state.best_model()), values(&stopped.model));
    assert_ne!(values(state.best_model()), values(&state.model));
    // A resumed run knows it too, from epochs before it was resumed.
    train(&split, &epochs("7"), &parts).unwrap();
    let resumed = train(&split, &[&epochs("8")[..], &["--resume"]].concat(), &parts).unwrap();
    assert_eq!(values(resumed.best_model()), values(&stopped.model));
    assert_eq!(std::fs::read(&whole).unwrap(), std::fs::read(&parts).unwrap());
}

#[test]
fn without_validation_the_last_epoch_is_tested() {
    let of_user = vec![vec![0, 1, 2], vec![1, 2, 3], vec![3, 0, 1]];
    let sequences = Sequences { of_user, item_names: (0..5).map(|i| i.to_string()).collect() };
    let split =
        Split::given(Given { sequences, trained: vec![3; 3], test: vec![vec![3, 4], vec![0], vec![]] }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let state = train(&split, &["--loss", "full", "--epochs", "2"], &path).unwrap();
    assert!(state.best.is_none() && state.curve.iter().all(|point| point.validation.is_none()));
    let resumed = train(&split, &["--loss", "full", "--epochs", "3", "--resume"], &path).unwrap();
    assert_eq!((resumed.curve[..2].to_vec(), best_epoch(&resumed.curve)), (state.curve, 2));
}

#[test]
fn a_checkpoint_of_other_settings_is_refused() {
    let split = small_split();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let base = ["--loss", "logq", "--epochs", "2", "--resume"];
    train(&split, &["--loss", "logq", "--epochs", "1"], &path).unwrap();
    let before = std::fs::read(&path).unwrap();
    for (flags, difference) in [
        (&["--history", "3"][..], "--history is 3, and 20 there"),
        (&["--evaluate", "9"], "--evaluate is 9 users, and all users there"),
        (&["--learning-rate", "0.3"], "--learning-rate is 0.3, and 0.2 there"),
        (&["--temperature", "0.1"], "--temperature is 0.1, and 0.07 there"),
        (&["--batch", "32", "--dim", "4"], "--batch is 32, and 64 there; --dim is 4, and 8 there"),
        (&["--learn-temperature"], "--learn-temperature is true, and false there"),
        (&["--next", "3"], "--next is 3, and 1 there"),
        (&["--false-negative-ratio", "0.9"], "--false-negative-ratio is 0.9, and none there"),
        (&["--false-negative-margin", "-1"], "--false-negative-margin is -1.0, and none there"),
        (
            &["--temperature-schedule", "linear", "--final-temperature", "0.05"],
            "--temperature-schedule is Linear to 0.05 in 2 epochs, and constant there",
        ),
    ] {
        let mut all = vec!["train_two_tower"];
        all.extend(if flags.contains(&"--dim") { &[][..] } else { &["--dim", "8", "--batch", "64"] });
        let options = Options::parse_from(all.iter().chain(&base).chain(flags));
        let objective = &options.objectives().unwrap()[0];
        let error = run(&split, &options, objective).train(&mut Cpu::new(), &path).err().unwrap().to_string();
        assert!(error.starts_with("--resume: checkpoint") && error.ends_with(difference), "{error}");
    }
    let other_q = ["--negatives", "in-batch", "--log-q", "count-min", "--epochs", "2", "--resume"];
    assert!(train(&split, &other_q, &path).err().unwrap().ends_with("--log-q is CountMin, and Exact there"));
    let error = train(&split, &["--loss", "logq", "--epochs", "1", "--resume"], &path).err();
    assert_eq!(error, None, "as many epochs as there are need no more");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    std::fs::write(&path, b"not a checkpoint").unwrap();
    assert!(train(&split, &base, &path).err().unwrap().contains("checkpoint"));
}

/// The same users, items and numbers of examples: only the order of time differs.
#[test]
fn a_checkpoint_of_other_data_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let mut reversed = generate::sequences(60, 2000);
    reversed.of_user.iter_mut().for_each(|items| items.reverse());
    train(&small_split(), &["--loss", "logq", "--epochs", "1"], &path).unwrap();
    let flags = ["--loss", "logq", "--epochs", "2", "--resume"];
    let error = train(&Split::new(reversed).unwrap(), &flags, &path).err().unwrap();
    assert!(error.contains("the data are others") && error.contains("rule: the same interactions"), "{error}");
    assert!(train(&small_split(), &flags, &path).is_ok());
}

/// Also where the last step did it, which no later loss shows: one step in all.
#[test]
fn a_model_that_is_not_finite_is_an_error_and_no_checkpoint() {
    let split = small_split();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let one_step = ["--epochs", "1", "--batch", "100000", "--learning-rate", "3e38", "--loss"];
    for loss in ["in-batch", "full"] {
        let options = Options::parse_from(["train_two_tower", "--dim", "8"].iter().chain(&one_step).chain(&[loss]));
        let objective = &options.objectives().unwrap()[0];
        let error = run(&split, &options, objective).train(&mut Cpu::new(), &path).err().unwrap().to_string();
        assert!(error.contains("parameters that are not finite; lower --learning-rate"), "{error}");
        assert!(!path.exists());
    }
}

#[test]
fn an_interrupted_run_says_how_to_go_on() {
    let split = small_split();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let asked = AtomicBool::new(true);
    let interrupted = |flags: &[&str]| {
        let options = options(flags);
        let objective = &options.objectives().unwrap()[0];
        let run = Run { interrupt: &asked, ..run(&split, &options, objective) };
        let error = run.train(&mut Cpu::new(), &path).err().unwrap();
        assert!(error.is::<Interrupted>());
        error.to_string()
    };
    let error = interrupted(&["--loss", "logq", "--epochs", "2"]);
    assert!(error.contains("stopped in epoch 1; no epoch was finished; the same command with --resume"), "{error}");
    assert!(!path.exists());
    train(&split, &["--loss", "logq", "--epochs", "1"], &path).unwrap();
    let before = std::fs::read(&path).unwrap();
    let error = interrupted(&["--loss", "logq", "--epochs", "2", "--resume"]);
    assert!(error.contains("stopped in epoch 2; ") && error.contains("has the epochs before"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn training_lowers_every_loss() {
    let split = small_split();
    let folder = tempfile::tempdir().unwrap();
    for objective in &objectives() {
        let options = options(&["--epochs", "3"]);
        let path = folder.path().join(objective.file_stem());
        let curve = run(&split, &options, objective).train(&mut Cpu::new(), &path).unwrap().curve;
        assert!(curve[2].train_loss < curve[0].train_loss, "{}: {curve:?}", objective.name);
    }
}

/// A margin below every score leaves no negatives, and a row without negatives has loss 0.
#[test]
fn the_filter_and_further_positives_reach_the_loss() {
    let split = small_split();
    let folder = tempfile::tempdir().unwrap();
    let loss = |name: &str, flags: &[&str]| {
        let flags = [&["--loss", "full", "--epochs", "1"], flags].concat();
        train(&split, &flags, &folder.path().join(name)).unwrap().curve[0].train_loss
    };
    let plain = loss("plain", &[]);
    assert_eq!(loss("filtered", &["--false-negative-margin", "-1000"]), 0.0);
    assert_ne!(loss("next", &["--next", "2"]), plain);
    assert!(plain > 1.0);
}
