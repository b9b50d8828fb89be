use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use super::*;

fn format(columns: Option<&str>, separator: Option<&str>, skip_bad_lines: bool) -> Format {
    Format {
        columns: columns.map(|text| text.parse().unwrap()),
        separator: separator.map(|text| text.parse().unwrap()),
        skip_bad_lines,
    }
}

/// A file in a folder that is removed with it.
struct Written {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn written(bytes: &[u8]) -> Written {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    File::create(&path).unwrap().write_all(bytes).unwrap();
    Written { _folder: folder, path }
}

/// Each user's items by name, and the description without the path.
fn load(bytes: &[u8], format: &Format) -> Result<(Vec<Vec<String>>, String), String> {
    let file = written(bytes);
    let path = file.path.display().to_string();
    let (sequences, description) =
        read_file(&file.path, format).map_err(|e| e.to_string().replace(&format!("{path}: "), ""))?;
    let name = |&item: &u32| sequences.item_names[item as usize].clone();
    let of_user = sequences.of_user.iter().map(|items| items.iter().map(name).collect()).collect();
    Ok((of_user, description.replace(&format!("{path}: "), "")))
}

fn sequences(text: &str) -> Vec<Vec<String>> {
    load(text.as_bytes(), &Format::default()).unwrap().0
}

fn error(text: &str) -> String {
    load(text.as_bytes(), &Format::default()).unwrap_err()
}

/// The same three interactions, later ones first, as data sets have them.
#[test]
fn what_people_have_is_read_alike() {
    let expected = [vec!["10".to_string(), "11".into()], vec!["10".into()]];
    for text in [
        "userId,movieId,rating,timestamp\n1,11,4.0,978300761\n1,10,3.5,978300760\n2,10,5.0,1\n",
        "1::11::978300761\n1::10::978300760\n2::10::1\n",
        "1\t11\t978300761\n1\t10\t978300760\n2\t10\t1\n",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n\
         1\t11\t4\t9.78300761e8\n1\t10\t4\t9.7830076e8\n2\t10\t4\t1.0\n",
        "timestamp;User_ID;PRODUCT\r\n\
         2000-01-01T00:00:02Z;1;11\r\n2000-01-01T00:00:01Z;1;10\r\n2000-01-01T00:00:01Z;2;10\r\n",
        "\u{feff}\"user\",\"item\",\"ts\"\n\"1\",\"11\",\"2.5\"\n\"1\",\"10\",\"2.25\"\n\"2\",\"10\",\"1\"\n",
        "\u{feff}1,11,2\n1,10,1\n2,10,1",
        "rating,parent_asin,user_id,timestamp\n5.0,11,1,1588687728923\n4.0,10,1,1588687728922\n1.0,10,2,1\n",
    ] {
        assert_eq!(sequences(text), expected, "{text}");
    }
    for (text, columns, separator) in [
        // ratings.dat, u.data, Amazon's ratings, Gowalla's check-ins, and names of nobody's.
        ("1::11::5::978300761\n1::10::3::978300760\n2::10::3::1\n", "user=1,item=2,time=4", None),
        ("1\t11\t3\t881250949\n1\t10\t3\t881250948\n2\t10\t3\t1\n", "user=1,item=2,time=4", None),
        ("1,11,5.0,1400000001\n1,10,1.0,1400000000\n2,10,1.0,1\n", "user=1,item=2,time=4", None),
        (
            "1\t2010-10-19T23:55:27Z\t30.2\t-97.7\t11\n\
             1\t2010-10-18T22:17:43Z\t30.2\t-97.7\t10\n2\t2010-10-17T23:42:03Z\t3\t4\t10\n",
            "user=1,item=5,time=2",
            None,
        ),
        ("who|what|when\n1|11|2\n1|10|1\n2|10|1\n", "user=who,item=what,time=when", None),
        ("1 11 2\n1 10 1\n2 10 1\n", "user=1,item=2,time=3", Some("space")),
        ("1 10\n1 11\n2 10\n", "user=1,item=2", Some("space")),
    ] {
        let format = format(Some(columns), separator, false);
        assert_eq!(load(text.as_bytes(), &format).unwrap().0, expected, "{text}");
    }
}

#[test]
fn ratings_are_not_taken_for_times() {
    for text in ["1,10,5,100\n1,11,1,200\n", "1::10::5::100\n", "1\t10\t5\t100\n"] {
        for skip in [false, true] {
            let error = load(text.as_bytes(), &format(None, None, skip)).unwrap_err();
            let parts = ["line 1: 4 fields and no header: \"1\", \"10\", \"5\"", "--columns user=1,item=2,time=4"];
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
            assert!(!error.contains("--skip-bad-lines"), "{error}");
        }
    }
    // With three fields they cannot be told from times, but one sees it.
    let ratings: String = (0..100).map(|i| format!("u{},i{i},{}\n", i % 7, 1 + i % 5)).collect();
    let (_, description) = load(ratings.as_bytes(), &Format::default()).unwrap();
    assert!(description.contains("NOTE: the times of this file have only 5 different values"), "{description}");
    let times: String = (0..100).map(|i| format!("u{},i{i},{}\n", i % 7, 1 + i % 50)).collect();
    assert!(!load(times.as_bytes(), &Format::default()).unwrap().1.contains("NOTE"));
}

#[test]
fn a_bad_line_is_an_error_with_its_number() {
    let bad_time = error("user_id,item_id,timestamp\nu,85123A,1\nu,22,noon\n");
    assert!(bad_time.starts_with("line 3: time \"noon\" is not a time; rule: a number"), "{bad_time}");
    assert!(bad_time.ends_with("(--skip-bad-lines counts such lines instead)"), "{bad_time}");
    assert!(error("u,a,1\n\nu,b\n").starts_with("line 3: there are 2 fields; rule: 3, as in the first line"));
    assert!(error("user_id,item_id,timestamp\nu,,1\n").starts_with("line 2: item is empty"));
    let quote = error("\"u\",a,1\r\n\r\nu,\"a,1\r\nu,a,1\r\n");
    assert!(quote.starts_with("line 3: there are 2 fields") && quote.contains("a quote is not closed"), "{quote}");
    assert!(error("u,a,1\nu,b,2010-10-19\n").contains("the time is a date; rule: a number as in the first line"));
    assert!(error("u,a,2010-10-19\nu,b,1\n").contains("the time is a number; rule: a date"));
    assert_eq!(error(""), "the file has no lines");
    assert!(error("1 10 100\n1 11 200\n").contains("line 1: no separator is recognised in \"1 10 100\"; --separator"));
}

/// It decides what all the others mean.
#[test]
fn the_first_line_is_never_skipped() {
    for text in ["who,what,when\nu,a,1\n", "u,,1\nu,a,1\n", "\u{feff},a,1\nu,a,1\n", "userId,title\n", "u,a\n"] {
        for skip in [false, true] {
            let error = load(text.as_bytes(), &format(None, None, skip)).unwrap_err();
            assert!(error.starts_with("line 1: ") && !error.contains("--skip-bad-lines"), "{error}");
        }
    }
    let chosen = format(Some("user=1,item=2,time=3"), None, true);
    assert!(load(b"u,a,1st\nu,a,1\n", &chosen).unwrap_err().starts_with("line 1: time \"1st\" is not a time"));
}

#[test]
fn bad_lines_are_counted_on_request() {
    let text = "u,a,1\nu,b\nu,c,x\nu,d,4\n";
    let (of_user, description) = load(text.as_bytes(), &format(None, None, true)).unwrap();
    assert_eq!(of_user, [["a", "d"]]);
    assert_eq!(
        description,
        "2 interactions (user from column 1, item from 2, time from 3), 0 repeats of an earlier one dropped, \
         2 bad lines skipped"
    );
}

#[test]
fn sequences_are_in_time_order_without_repeats() {
    let text = "timestamp,user_id,item_id\n5,u,late\n1,u,early\n1,v,late\n1,u,tie\n9,u,early\n";
    let (of_user, description) = load(text.as_bytes(), &Format::default()).unwrap();
    assert_eq!(of_user, [vec!["early", "tie", "late"], vec!["late"]]);
    assert!(
        description.contains("5 interactions (user from column \"user_id\", item from \"item_id\""),
        "{description}"
    );
    assert!(description.ends_with("1 repeats of an earlier one dropped"), "{description}");
}

#[test]
fn gzip_is_recognised_by_content() {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(b"\xef\xbb\xbfu,a,1\nu,b,2\n").unwrap();
    let bytes = gz.finish().unwrap();
    assert_eq!(load(&bytes, &Format::default()).unwrap().0, [["a", "b"]]);
    assert!(load(&bytes[..bytes.len() - 9], &Format::default()).is_err());
    assert!(
        read_file(Path::new("/absent/file"), &Format::default()).err().unwrap().to_string().contains("/absent/file")
    );
}

fn given(train: &str, validation: Option<&str>, test: &str, format: &Format) -> Result<(Given, String), String> {
    let [train, test] = [train, test].map(|text| written(text.as_bytes()));
    let validation = validation.map(|text| written(text.as_bytes()));
    read_given(&train.path, validation.as_ref().map(|file| &*file.path), &test.path, format).map_err(|e| e.to_string())
}

#[test]
fn a_split_of_files_is_read_as_it_is() {
    // Users 7 and 8 with their training items, a validation item, test items of which one was trained on and one is new
    // to the catalogue, and a user without training.
    let (split, description) =
        given("7,a\n7,b\n8,b\n7,a\n", Some("8,a\n"), "7,b\n7,c\n7,d2\n8,c\n9,a\n", &Format::default()).unwrap();
    let Given { sequences, trained, test } = split;
    assert_eq!(sequences.item_names, ["a", "b", "c", "d2"]);
    assert_eq!(sequences.of_user, [vec![0, 1], vec![1, 0]]);
    assert_eq!((trained, test), (vec![2, 1], vec![vec![2, 3], vec![2]]));
    let lines: Vec<&str> = description.lines().map(|line| line.rsplit_once("file: ").unwrap().1).collect();
    let layout = "(user from column 1, item from 2, time from the order of the lines)";
    assert_eq!(
        lines,
        [
            format!("4 interactions {layout}, 1 repeats of an earlier one dropped"),
            format!("1 interactions {layout}, 0 repeats of an earlier one dropped"),
            format!(
                "5 interactions {layout}, 1 repeats of an earlier one dropped, \
                 1 users without training interactions left out"
            ),
        ]
    );
    // Times put the training items in order; the files may have different columns.
    let (split, _) =
        given("user,item,time\n7,a,2\n7,b,1\n", None, "item_id,user_id\nc,7\n", &Format::default()).unwrap();
    assert_eq!(split.sequences.of_user, [[1, 0]]);
    assert_eq!(split.test, [[2]]);
    let error = given("who,what\n7,a\n", None, "7,a\n", &Format::default()).unwrap_err();
    assert!(error.contains("line 1: no column is recognised as user, item;"), "{error}");
}

/// The LightGCN splits.
#[test]
fn lists_of_a_user_and_items_are_read() {
    let (split, description) = given("0 0 1 2\n1 2 0\n2 3\n", None, "0 3 4\n1 1\n2 \n", &Format::default()).unwrap();
    assert_eq!(split.sequences.of_user, [vec![0, 1, 2], vec![2, 0], vec![3]]);
    assert_eq!((split.trained, split.test), (vec![3, 2, 1], vec![vec![3, 4], vec![1], vec![]]));
    assert!(description.contains("6 interactions (a user and the user's items in each line)"), "{description}");
    // Three fields in every line are user, item and time more likely; with the separator named, they are.
    let triples = ("0 5 100\n0 6 50\n1 5 10\n", "0 7 200\n");
    let error = given(triples.0, None, triples.1, &Format::default()).unwrap_err();
    assert!(error.contains("every line has three fields") && error.contains("--separator space"), "{error}");
    let (split, _) = given(triples.0, None, triples.1, &format(None, Some("space"), false)).unwrap();
    assert_eq!(split.sequences.of_user, [vec![1, 0], vec![0]]);
    assert_eq!(split.test, [vec![2], vec![]]);
}
