use super::*;

fn record(line: &str) -> ByteRecord {
    line.split(',').collect::<Vec<_>>().into()
}

/// Places of user, item and time, and whether the line is a header.
type Found = Result<(usize, usize, Option<usize>, bool), String>;

fn first(line: &str, choice: Option<&str>, times: Times) -> Found {
    let choice = choice.map(|text| text.parse::<Choice>()).transpose()?;
    let First { columns, header } = First::of(&record(line), choice.as_ref(), times)?;
    Ok((columns.user, columns.item, columns.time, header))
}

#[test]
fn names_of_common_data_sets_are_known() {
    for (line, expected) in [
        ("user_id,item_id,timestamp", (0, 1, Some(2), true)),
        ("userId,movieId,rating,timestamp", (0, 1, Some(3), true)),
        ("USER-ID,Product ID,Date", (0, 1, Some(2), true)),
        ("ts,uid,iid", (1, 2, Some(0), true)),
        ("user_id:token,item_id:token,rating:float,timestamp:float", (0, 1, Some(3), true)),
        ("rating,parent_asin,user_id,timestamp", (2, 1, Some(3), true)),
        ("reviewerID,asin,overall,unixReviewTime", (0, 1, Some(3), true)),
    ] {
        for times in [Times::Needed, Times::Optional] {
            assert_eq!(first(line, None, times), Ok(expected), "{line}");
        }
    }
    assert_eq!(first("userId,movieId,rating", None, Times::Optional), Ok((0, 1, None, true)));
}

#[test]
fn without_a_header_there_are_three_fields() {
    assert_eq!(first("1,10,100", None, Times::Needed), Ok((0, 1, Some(2), false)));
    assert_eq!(first("u,date, 2010-10-19", None, Times::Needed), Ok((0, 1, Some(2), false)));
    assert_eq!(first("1,10", None, Times::Optional), Ok((0, 1, None, false)));
    for (line, example) in [
        ("1,10,5,100", "--columns user=1,item=2,time=4"),
        ("0,2010-10-19T23:55:27Z,30.2,-97.7,22847", "--columns user=1,item=5,time=2"),
        ("A1,B2,5.0,1400000000", "--columns user=1,item=2,time=4"),
        ("1,10", "--columns user=1,item=2 where the lines are in the order of time"),
    ] {
        let error = first(line, None, Times::Needed).unwrap_err();
        let quoted = line.split(',').map(|field| format!("{field:?}")).collect::<Vec<_>>().join(", ");
        assert!(error.contains("no header") && error.contains(&quoted) && error.ends_with(example), "{error}");
    }
}

#[test]
fn a_header_of_unknown_names_is_an_error_with_the_names() {
    for (line, parts) in [
        ("who,what,when", &["no column is recognised as user, item, time", "\"who\", \"what\", \"when\""][..]),
        ("user,what,when", &["recognised as item, time", "--columns user=NAME,item=NAME,time=NAME"]),
        (
            "user_id,item_id,rating",
            &["recognised as time", "\"rating\"", "without time= where the lines are in the order"],
        ),
        ("user_id,item_id", &["recognised as time"]),
        ("user_id,item_id,date,time", &["more than one column may be time", "\"date\", \"time\""]),
        ("user_id,uid,item,ts", &["more than one column may be user"]),
    ] {
        let error = first(line, None, Times::Needed).unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{line}: {error}");
    }
    let error = first("who,what", None, Times::Optional).unwrap_err();
    assert!(error.contains("recognised as user, item;"), "{error}");
}

#[test]
fn columns_are_chosen_by_name_or_number() {
    let header = "who,what,stars,when";
    assert_eq!(first(header, Some("user=who,item=WHAT,time=when"), Times::Needed), Ok((0, 1, Some(3), true)));
    assert_eq!(first(header, Some("time=4, item=2, user=1"), Times::Needed), Ok((0, 1, Some(3), true)));
    assert_eq!(first(header, Some("user=who,item=2"), Times::Needed), Ok((0, 1, None, true)));
    assert_eq!(first("1,10,5,100", Some("user=1,item=2,time=4"), Times::Needed), Ok((0, 1, Some(3), false)));
    assert_eq!(first("1,10,5,2010-10-19", Some("user=2,item=1,time=4"), Times::Needed), Ok((1, 0, Some(3), false)));
    assert_eq!(first("userId,movieId,5", Some("user=1,item=2"), Times::Needed), Ok((0, 1, None, true)));
    assert_eq!(first("1,10,5", Some("user=1,item=2"), Times::Needed), Ok((0, 1, None, false)));
    for (choice, message) in [
        ("user=1,item=2,time=5", "--columns names column 5; the first line has \"who\", \"what\""),
        ("user=1,item=2,time=then", "--columns names \"then\"; the first line has \"who\""),
        ("user=1,item=1", "--columns names a column twice"),
        ("user=1,item=2,time=what", "--columns names a column twice"),
        ("user=1", "user or item is missing; rule: user=..,item=..,time=.."),
        ("user=1,item=0", "\"item=0\" is column 0"),
        ("user=1,user=2,item=3", "\"user=2\" is column 0 or the second user"),
        ("user=1,item=2,rating=3", "\"rating\" is not user, item or time"),
        ("1,2,4", "\"1\" has no =; rule"),
        ("user=,item=2", "user is empty"),
    ] {
        let error = first(header, Some(choice), Times::Needed).unwrap_err();
        assert!(error.starts_with(message), "{error}");
    }
    let error = first("a,b,a", Some("user=a,item=b"), Times::Needed).unwrap_err();
    assert!(error.contains("several times"), "{error}");
}

#[test]
fn every_line_has_the_fields_of_the_first() {
    let First { columns, .. } = First::of(&record("user,item,stars,time"), None, Times::Needed).unwrap();
    let parse = |line: &str| {
        let record = record(line);
        columns.parse(&record).map(|line| (line.user.to_string(), line.item.to_string(), line.time.is_some()))
    };
    assert_eq!(parse("u, a b ,5,100"), Ok(("u".into(), "a b".into(), true)));
    assert_eq!(parse("u,a,100").unwrap_err(), "there are 3 fields; rule: 4, as in the first line");
    assert_eq!(parse("u,a,5,6,100").unwrap_err(), "there are 5 fields; rule: 4, as in the first line");
    assert_eq!(parse("u, ,5,100").unwrap_err(), "item is empty");
    assert!(parse("u,a,5,noon").unwrap_err().starts_with("time \"noon\" is not a time; rule: a number such as"));
    let latin = ByteRecord::from(vec![&b"\xe9"[..], b"a", b"5", b"100"]);
    assert_eq!(columns.parse(&latin).err().unwrap(), "user is not UTF-8");
}
