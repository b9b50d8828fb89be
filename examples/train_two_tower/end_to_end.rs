//! Whole runs, from files on disk to metrics.json.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Parser;
use serde_json::Value;

use crate::interrupt::Interrupted;
use crate::options::Options;
use crate::{Fallible, generate, run};

/// A folder with files of interactions and results.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), contents).unwrap();
        self.path(name).display().to_string()
    }

    /// Runs with results in the folder `out`.
    fn run(&self, out: &str, flags: &[&str]) -> Fallible<Value> {
        self.run_until(out, flags, &AtomicBool::new(false))
    }

    fn run_until(&self, out: &str, flags: &[&str], interrupt: &AtomicBool) -> Fallible<Value> {
        let out = self.path(out);
        let out_text = out.display().to_string();
        let all = ["train_two_tower", "--device", "cpu", "--dim", "8", "--out", &out_text];
        let options = Options::try_parse_from(all.iter().chain(flags))?;
        run(&options, interrupt)?;
        Ok(metrics(&out))
    }
}

fn metrics(out: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(out.join("metrics.json")).unwrap()).unwrap()
}

fn message(result: Fallible<Value>) -> String {
    result.expect_err("an error").to_string()
}

/// Users, items and times of generated sequences, in the order of time.
fn interactions() -> Vec<(usize, u32, usize)> {
    let sequences = generate::sequences(80, 150).of_user;
    let of_user = |(user, items): (usize, Vec<u32>)| {
        items.into_iter().enumerate().map(move |(at, item)| (user, item, 1_000_000_000 + at * 86_400))
    };
    sequences.into_iter().enumerate().flat_map(of_user).collect()
}

fn table(header: &str, line: impl Fn(usize, u32, usize) -> String) -> String {
    // Backwards, so that the order is that of the times and of nothing else; users and items come first as they do
    // elsewhere.
    let mut lines: Vec<String> = interactions().iter().map(|&(user, item, time)| line(user, item, time)).collect();
    lines.reverse();
    format!("{header}{}\n", lines.join("\n"))
}

/// The same data in the forms that people have give the same metrics.
#[test]
fn files_of_each_kind_give_the_same_metrics() {
    let folder = Folder::new();
    let iso = |time: usize| jiff::Timestamp::from_second(time as i64).unwrap().to_string();
    let stars = |item: u32| 1 + item % 5;
    let movielens = table("userId,movieId,rating,timestamp\n", |u, i, t| format!("{u},{i},{}.5,{t}", stars(i)));
    let files = [
        ("ours.csv", table("user_id,item_id,timestamp\n", |u, i, t| format!("{u},{i},{t}")), None),
        ("ratings.csv", movielens.clone(), None),
        ("ratings.dat", table("", |u, i, t| format!("{u}::{i}::{}::{t}", stars(i))), Some("user=1,item=2,time=4")),
        ("u.data", table("", |u, i, t| format!("{u}\t{i}\t{}\t{t}", stars(i))), Some("user=1,item=2,time=4")),
        ("amazon.csv", table("", |u, i, t| format!("{u},{i},{}.0,{t}", stars(i))), Some("user=1,item=2,time=4")),
        (
            "gowalla.txt",
            table("", |u, i, t| format!("{u}\t{}\t30.2\t-97.7\t{i}", iso(t))),
            Some("user=1,item=5,time=2"),
        ),
        ("bom.csv", format!("\u{feff}{}", movielens.replace('\n', "\r\n")), None),
        (
            "atomic.inter",
            table("timestamp:float\titem_id:token\tuser_id:token\n", |u, i, t| format!("{t}.0\t{i}\t{u}")),
            None,
        ),
    ];
    let flags = ["--loss", "logq", "--epochs", "1"];
    let mut first = None;
    for (name, text, columns) in files {
        let file = folder.write(name, text);
        let mut flags = [&flags[..], &["--data", &file]].concat();
        flags.extend(columns.iter().flat_map(|columns| ["--columns", columns]));
        let runs = folder.run(&format!("out-{name}"), &flags).unwrap_or_else(|e| panic!("{name}: {e}"))["runs"].clone();
        assert_eq!(&runs, first.get_or_insert(runs.clone()), "{name}");
    }
    // Ratings as times are another order, and other metrics.
    let file = folder.write("wrong.csv", movielens);
    let wrong = [&flags[..], &["--data", &file, "--columns", "user=1,item=2,time=3"]].concat();
    assert_ne!(Some(folder.run("out-wrong", &wrong).unwrap()["runs"].clone()), first);
}

/// Recall@20 and NDCG@20 of the baseline that ranks by popularity, which anybody can count.
#[test]
fn a_given_split_reports_recall_and_ndcg_at_20() {
    let folder = Folder::new();
    // Item i from 0 to 29 is trained on by 40 - i users, so that popularity ranks them 0, 1, ..., 29. User 39 takes
    // item 0 alone, and user 0 all 30.
    let train: String = (0..40)
        .map(|user| {
            let items = (0..30).filter(|item| user < 40 - item).map(|item| format!(" {item}"));
            format!("{user}{}\n", items.collect::<String>())
        })
        .collect();
    // User 39's list is 1, 2, ..., 20, 21, ...: places 1, 20 and 21. User 38, who has 0 and 1: item 3 is second.
    let test = "39 1 20 21\n38 3\n";
    let files = [folder.write("train.txt", train), folder.write("test.txt", test)];
    let flags = ["--train", &files[0], "--test", &files[1], "--loss", "full", "--epochs", "1"];
    let metrics = folder.run("out", &flags).unwrap();
    let popular = &metrics["most_popular"];
    let gain = |place: f64| 1.0 / (place + 1.0).log2();
    let ideal = gain(1.0) + gain(2.0) + gain(3.0);
    let expected_ndcg = ((gain(1.0) + gain(20.0)) / ideal + gain(2.0)) / 2.0;
    let near = |found: &Value, expected: f64| (found.as_f64().unwrap() - expected).abs() < 1e-12;
    assert!(near(&popular["Recall@20"], (2.0 / 3.0 + 1.0) / 2.0), "{popular}");
    assert!(near(&popular["NDCG@20"], expected_ndcg), "{popular} {expected_ndcg}");
    assert!(near(&popular["Recall@10"], (1.0 / 3.0 + 1.0) / 2.0), "{popular}");
    let run = &metrics["runs"][0];
    assert!(run["test"]["Recall@20"].as_f64().is_some() && run["epochs"][0]["validation NDCG@10"].is_null(), "{run}");

    // With a validation file there is a best epoch to choose, and its items are neither trained on nor recommended
    // again.
    let validation = folder.write("validation.txt", "39 1 2\n38 4 2 3\n");
    let flags = [&flags[..], &["--validation", &validation]].concat();
    let metrics = folder.run("validated", &flags).unwrap();
    assert!(metrics["runs"][0]["epochs"][0]["validation NDCG@10"].as_f64().is_some());
    // User 39's list begins with 3 now: 20 and 21 are in places 18 and 19, and item 1 is no target. User 38 has none
    // left.
    assert!(near(&metrics["most_popular"]["Recall@20"], 1.0), "{metrics}");
    assert!(near(&metrics["most_popular"]["MRR"], 1.0 / 18.0), "{metrics}");
}

#[test]
fn resumed_data_must_be_the_same() {
    let folder = Folder::new();
    let a = folder.write("a.csv", table("user,item,time\n", |u, i, t| format!("{u},{i},{t}")));
    let b = folder.write("b.csv", table("user,item,time\n", |u, i, t| format!("{u},{i},-{t}")));
    let flags = ["--loss", "logq", "--epochs"];
    folder.run("out", &[&flags[..], &["1", "--data", &a]].concat()).unwrap();
    let before = metrics(&folder.path("out"));
    let error = message(folder.run("out", &[&flags[..], &["2", "--resume", "--data", &b]].concat()));
    assert!(error.contains("the data are others"), "{error}");
    assert_eq!(metrics(&folder.path("out")), before);
    folder.run("out", &[&flags[..], &["2", "--resume", "--data", &a]].concat()).unwrap();
}

#[test]
fn a_second_run_does_not_write_over_the_first() {
    let folder = Folder::new();
    let flags = ["--generate-users", "60", "--generate-items", "200", "--loss", "logq", "--epochs"];
    let with = |more: &[&'static str]| [&flags[..], more].concat();
    let first = folder.run("out", &with(&["2"])).unwrap();
    for more in [&["1"][..], &["3"], &["3", "--loss", "full"]] {
        let flags: Vec<&str> = if more.len() > 1 { ["--loss", "full", "--epochs", "3"].to_vec() } else { with(more) };
        let error = message(folder.run("out", &flags));
        assert!(error.contains("holds logq-seed1.safetensors of an earlier run; rule: --resume"), "{error}");
    }
    assert_eq!(metrics(&folder.path("out")), first);
    let error = message(folder.run("out", &with(&["1", "--resume"])));
    assert!(error.contains("--epochs is 1; rule: at least the 2 that checkpoint"), "{error}");
    assert_eq!(folder.run("out", &with(&["2", "--resume"])).unwrap(), first);
    assert_eq!(folder.run("other", &with(&["2"])).unwrap(), first);
}

/// With one training target, corrected logQ has a Q of 1, and stops; the losses before it are reported.
#[test]
fn a_loss_that_fails_does_not_lose_the_others() {
    let folder = Folder::new();
    let data = folder.write("one.csv", "u,a,1\nu,b,2\nu,c,3\nu,d,4\nv,a,1\nv,b,2\nv,c,3\nv,d,4\n");
    let error = message(folder.run("out", &["--data", &data, "--epochs", "1"]));
    assert!(error.contains("log_q"), "{error}");
    let runs = metrics(&folder.path("out"))["runs"].clone();
    let names: Vec<&str> = runs.as_array().unwrap().iter().map(|run| run["loss"].as_str().unwrap()).collect();
    assert_eq!(names, ["in-batch", "logq"]);
    assert!(folder.path("out").join("curves.svg").exists());
}

#[test]
fn a_model_that_diverges_has_no_table() {
    let folder = Folder::new();
    let flags = ["--generate-users", "60", "--generate-items", "200", "--loss", "full", "--epochs", "1"];
    let error = message(folder.run("out", &[&flags[..], &["--batch", "100000", "--learning-rate", "3e38"]].concat()));
    assert!(error.contains("not finite; lower --learning-rate"), "{error}");
    assert_eq!(fs::read_dir(folder.path("out")).unwrap().count(), 0);
}

#[test]
fn an_interrupted_run_goes_on_with_resume() {
    let folder = Folder::new();
    let flags = ["--generate-users", "60", "--generate-items", "200", "--loss", "logq", "--epochs", "2"];
    let error = folder.run_until("out", &flags, &AtomicBool::new(true)).err().unwrap();
    assert!(error.is::<Interrupted>() && error.to_string().contains("with --resume goes on from there"), "{error}");
    let resumed = folder.run("out", &[&flags[..], &["--resume"]].concat()).unwrap();
    assert_eq!(resumed, folder.run("whole", &flags).unwrap());
}
