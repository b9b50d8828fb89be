use super::*;
use catalog_softmax::FalseNegativeFilter;

fn names(flags: &[&str]) -> Result<Vec<String>, String> {
    let parsed = Options::try_parse_from(["train_two_tower"].iter().chain(flags)).map_err(|e| e.to_string())?;
    Ok(parsed.objectives()?.into_iter().map(|objective| objective.name).collect())
}

#[test]
fn lists_and_sources_are_compared_in_turn() {
    assert_eq!(names(&[]).unwrap(), ["in-batch", "logq", "corrected-logq", "sampled", "full"]);
    assert_eq!(names(&["--loss", "sampled"]).unwrap(), ["sampled"]);
    let lists = ["--negatives", "in-batch", "--negatives", "uniform:8,in-batch", "--log-q", "exact,streaming"];
    let expected = ["in-batch", "in-batch streaming", "in-batch,uniform:8", "in-batch,uniform:8 streaming"];
    assert_eq!(names(&lists).unwrap(), expected);
    let corrected = ["--negatives", "in-batch", "--correction", "corrected-logq"];
    assert_eq!(names(&corrected).unwrap(), ["in-batch corrected"]);
}

#[test]
fn a_filter_is_part_of_the_loss() {
    let filter = |flags: &[&str]| {
        let options = Options::try_parse_from(["train_two_tower"].iter().chain(flags)).unwrap();
        options.filtered(Objective::presets()[0].loss(0.5)).false_negatives
    };
    assert_eq!(filter(&[]), None);
    assert_eq!(filter(&["--false-negative-margin", "-1"]), Some(FalseNegativeFilter::Margin(-1.0)));
    assert_eq!(filter(&["--false-negative-ratio", "0.9"]), Some(FalseNegativeFilter::Ratio(0.9)));
}

#[test]
fn a_learned_temperature_starts_in_its_range() {
    let check = |temperature: &str, more: &[&str]| {
        let flags = ["train_two_tower", "--temperature", temperature];
        Options::try_parse_from(flags.iter().chain(more)).unwrap().check()
    };
    for temperature in ["0.009", "1.1"] {
        assert!(check(temperature, &[]).is_ok());
        let error = check(temperature, &["--learn-temperature"]).unwrap_err();
        assert!(error.starts_with(&format!("--temperature is {temperature}; rule: from 0.01 to 1")), "{error}");
    }
    for temperature in ["0.01", "1"] {
        assert!(check(temperature, &["--learn-temperature"]).is_ok());
    }
}

#[test]
fn what_contradicts_is_an_error_with_argument_and_rule() {
    for (flags, parts) in [
        (&["--negatives", "uniform:0"][..], &["invalid value 'uniform:0' for '--negatives <LIST>'", "from 1 to"][..]),
        (&["--negatives", "1024"], &["'--negatives <LIST>'", "\"1024\" is none of the pools; rule: in-batch"]),
        (&["--negatives", "in-batch", "--loss", "full"], &["--negatives <LIST>", "cannot be used with", "--loss"]),
        (&["--log-q", "streaming"], &["--negatives <LIST>"]),
        (&["--correction", "corrected-logq"], &["--negatives <LIST>"]),
        (&["--negatives", "in-batch", "--log-q", "sketch"], &["'sketch'", "--log-q", "count-min"]),
        (&["--negatives", "uniform:8", "--log-q", "count-min"], &["--log-q count-min does nothing for"]),
        (&["--negatives", "in-batch,queue:8", "--negatives", "queue:8,in-batch"], &["in-batch,queue:8 twice"]),
        (&["--generate-items", "99"], &["'99'", "--generate-items", "rule: a whole number from 100 to 4294967295"]),
        (&["--dim", "18446744073709551615"], &["--dim", "rule: a whole number from 1 to 4294967295"]),
        (&["--dim", "abc"], &["'abc'", "--dim", "rule: a whole number from 1 to"]),
        (&["--temperature", "-1"], &["'-1'", "--temperature", "rule: a number from 1e-38 to 3e38"]),
        (&["--learning-rate", "1e300"], &["'1e300'", "--learning-rate", "rule: a number from 1e-38 to 3e38"]),
        (&["--negatives", "row-uniform:4097"], &["--negatives <LIST>", "rule: a whole number from 1 to 4096"]),
        (&["--next", "0"], &["'0'", "--next <P>", "rule: a whole number from 1 to"]),
        (&["--false-negative-margin", "inf"], &["'inf'", "--false-negative-margin <X>", "rule: a finite number"]),
        (&["--false-negative-ratio", "0"], &["'0'", "--false-negative-ratio <X>", "rule: a number from 1e-38 to"]),
        (
            &["--false-negative-margin", "-1", "--false-negative-ratio", "1"],
            &["'--false-negative-margin <X>' cannot be used with '--false-negative-ratio <X>'"],
        ),
        (&["--seeds", "1,-2"], &["'-2'", "--seeds", "rule: a whole number from 0 to"]),
        (&["--negatives", "full"], &["--negatives <LIST>", "the whole catalogue is --loss full"]),
        (&["--separator", ""], &["--separator <TEXT>", "rule: a character or several"]),
        (&["--columns", "1,2,3"], &["--columns <COLUMNS>", "rule: user=..,item=..,time=.."]),
        (&["--train", "a"], &["--test <FILE>"]),
        (&["--test", "a"], &["--train <FILE>"]),
        (&["--validation", "a", "--data", "b"], &["--train <FILE>"]),
        (&["--train", "a", "--test", "b", "--data", "c"], &["'--train <FILE>' cannot be used with '--data <FILE>'"]),
    ] {
        let error = names(flags).expect_err(&flags.join(" "));
        assert!(parts.iter().all(|part| error.contains(part)), "{flags:?}: {error}");
    }
}

#[test]
fn options_of_files_need_a_file() {
    let check = |flags: &[&str]| Options::try_parse_from(["train_two_tower"].iter().chain(flags)).unwrap().check();
    for flags in [&["--columns", "user=1,item=2"][..], &["--separator", ";"], &["--skip-bad-lines"]] {
        let error = check(flags).unwrap_err();
        assert_eq!(error, format!("{} is given, but no file; rule: --data, or --train and --test", flags[0]));
        assert_eq!(check(&[flags, &["--data", "x"]].concat()), Ok(()));
        assert_eq!(check(&[flags, &["--train", "x", "--test", "y"]].concat()), Ok(()));
    }
    assert_eq!(check(&["--seeds", "1,2,1"]).unwrap_err(), "--seeds names 1 twice");
    assert_eq!(check(&["--seed", "1,2"]), Ok(()));
}

#[test]
fn help_shows_examples_and_the_version_is_the_crate_s() {
    let show = |flag: &str| Options::try_parse_from(["train_two_tower", flag]).unwrap_err().to_string();
    assert!(show("--help").contains("train_two_tower --train train.txt --test test.txt"));
    assert_eq!(show("--version"), format!("train_two_tower {}\n", env!("CARGO_PKG_VERSION")));
}
