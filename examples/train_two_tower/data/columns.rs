//! Which columns of a file hold user, item and time: by the names in its first line, by `--columns`, or by their order.

use std::str::FromStr;

use csv::ByteRecord;

use super::times::{Kind, RULE, Time};

/// Names of columns in common data sets, without case, `_`, `-`, spaces and what follows a colon (as in RecBole's
/// `user_id:token`).
const USER: [&str; 9] =
    ["user", "userid", "uid", "customer", "customerid", "visitor", "visitorid", "reviewer", "reviewerid"];
const ITEM: [&str; 31] = [
    "item",
    "itemid",
    "iid",
    "movie",
    "movieid",
    "product",
    "productid",
    "asin",
    "parentasin",
    "sku",
    "stockcode",
    "article",
    "articleid",
    "artist",
    "artistid",
    "book",
    "bookid",
    "isbn",
    "business",
    "businessid",
    "game",
    "gameid",
    "location",
    "locationid",
    "poi",
    "poiid",
    "song",
    "songid",
    "track",
    "trackid",
    "videoid",
];
const TIME: [&str; 13] = [
    "time",
    "timestamp",
    "ts",
    "date",
    "datetime",
    "unixtime",
    "unixtimestamp",
    "unixreviewtime",
    "reviewtime",
    "createdat",
    "eventtime",
    "checkintime",
    "invoicedate",
];

/// `--columns`: a name of the first line, or a number from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    user: Column,
    item: Column,
    /// None: the lines are in the order of time.
    time: Option<Column>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Column {
    Number(usize),
    Name(String),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const RULE: &str = "rule: user=..,item=..,time=.. with a column's name or its number from 1";
        let mut found: [Option<Column>; 3] = [None, None, None];
        for part in text.split(',') {
            let (role, column) = part.split_once('=').ok_or(format!("{part:?} has no =; {RULE}"))?;
            let place = ["user", "item", "time"].iter().position(|name| *name == role.trim());
            let place = &mut found[place.ok_or(format!("{role:?} is not user, item or time; {RULE}"))?];
            let column = match column.trim() {
                "" => return Err(format!("{role} is empty; {RULE}")),
                text => text.parse().map_or_else(|_| Column::Name(text.into()), Column::Number),
            };
            if column == Column::Number(0) || place.replace(column).is_some() {
                return Err(format!("{part:?} is column 0 or the second {role}; {RULE}"));
            }
        }
        let [Some(user), Some(item), time] = found else { return Err(format!("user or item is missing; {RULE}")) };
        Ok(Choice { user, item, time })
    }
}

/// Whether a file must have times. One that need not is in their order without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    Needed,
    Optional,
}

/// Where the fields stand in each line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    user: usize,
    item: usize,
    time: Option<usize>,
    /// How many fields each line has.
    fields: usize,
}

/// What a line says.
pub struct Fields<'a> {
    pub user: &'a str,
    pub item: &'a str,
    /// None where the file has no times.
    pub time: Option<(Time, Kind)>,
}

/// What the first line says: where the fields stand, and whether it is a header.
#[derive(Debug, PartialEq, Eq)]
pub struct First {
    pub columns: Columns,
    pub header: bool,
}

impl First {
    pub fn of(record: &ByteRecord, choice: Option<&Choice>, times: Times) -> Result<First, String> {
        match choice {
            Some(choice) => chosen(record, choice),
            None => recognised(record, times),
        }
    }
}

impl Columns {
    /// For the output: by name where the first line is a header, else by number.
    pub fn describe(&self, first: &ByteRecord, header: bool) -> String {
        let column = |place: usize| {
            if header {
                format!("{:?}", String::from_utf8_lossy(first[place].trim_ascii()))
            } else {
                (place + 1).to_string()
            }
        };
        let time = self.time.map_or("the order of the lines".into(), column);
        format!("user from column {}, item from {}, time from {time}", column(self.user), column(self.item))
    }

    /// The fields of a line.
    pub fn parse<'a>(&self, record: &'a ByteRecord) -> Result<Fields<'a>, String> {
        if record.len() != self.fields {
            return Err(format!("there are {} fields; rule: {}, as in the first line", record.len(), self.fields));
        }
        let field = |index: usize, name: &str| {
            let text = std::str::from_utf8(&record[index]).map_err(|_| format!("{name} is not UTF-8"))?.trim();
            if text.is_empty() { Err(format!("{name} is empty")) } else { Ok(text) }
        };
        let (user, item) = (field(self.user, "user")?, field(self.item, "item")?);
        let Some(time) = self.time else { return Ok(Fields { user, item, time: None }) };
        let text = field(time, "time")?;
        let time = Time::parse(text).ok_or_else(|| format!("time {text:?} is not a time; rule: {RULE}"))?;
        Ok(Fields { user, item, time: Some(time) })
    }
}

/// By `--columns`.
fn chosen(record: &ByteRecord, choice: &Choice) -> Result<First, String> {
    let place = |column: &Column| match column {
        Column::Number(number) if *number <= record.len() => Ok(number - 1),
        Column::Number(number) => Err(format!("--columns names column {number}; the first line has {}", names(record))),
        Column::Name(name) => match &places(record, |field| *field == normalised(name.as_bytes()))[..] {
            [place] => Ok(*place),
            [] => Err(format!("--columns names {name:?}; the first line has {}", names(record))),
            _ => Err(format!("--columns names {name:?}, which the first line has several times: {}", names(record))),
        },
    };
    let (user, item) = (place(&choice.user)?, place(&choice.item)?);
    let time = choice.time.as_ref().map(place).transpose()?;
    if user == item || time == Some(user) || time == Some(item) {
        return Err(format!("--columns names a column twice; the first line has {}", names(record)));
    }
    let by_name = |column: &Column| matches!(column, Column::Name(_));
    let header = [Some(&choice.user), Some(&choice.item), choice.time.as_ref()].into_iter().flatten().any(by_name)
        || match time {
            // A time has digits, and a name for it seldom.
            Some(time) => !record[time].iter().any(u8::is_ascii_digit),
            None => is(&USER, &normalised(&record[user])) || is(&ITEM, &normalised(&record[item])),
        };
    Ok(First { columns: Columns { user, item, time, fields: record.len() }, header })
}

/// By the names in the line where it is a header, else by order.
fn recognised(record: &ByteRecord, times: Times) -> Result<First, String> {
    let [users, items, time] = [&USER[..], &ITEM, &TIME].map(|list| places(record, |field| is(list, field)));
    let fields = record.len();
    let first = |user, item, time, header| Ok(First { columns: Columns { user, item, time, fields }, header });
    match (&users[..], &items[..], &time[..]) {
        (&[user], &[item], &[time]) => return first(user, item, Some(time), true),
        (&[user], &[item], []) if times == Times::Optional => return first(user, item, None, true),
        _ => {}
    }
    let is_time = |field: &[u8]| std::str::from_utf8(field).is_ok_and(|text| Time::parse(text.trim()).is_some());
    match fields {
        3 if is_time(&record[2]) => return first(0, 1, Some(2), false),
        // Names seldom have digits, and ids often.
        2 if times == Times::Optional && record.iter().flatten().any(u8::is_ascii_digit) => {
            return first(0, 1, None, false);
        }
        _ => {}
    }
    let data = users.is_empty() && items.is_empty() && time.is_empty() && record.iter().any(is_time);
    Err(if data { no_header(record) } else { unknown_header(record, [&users, &items, &time], times) })
}

/// Whether all three columns are recognised by their names.
pub fn is_header(record: &ByteRecord) -> bool {
    matches!(recognised(record, Times::Needed), Ok(First { header: true, .. }))
}

fn no_header(record: &ByteRecord) -> String {
    let kinds = record.iter().map(|field| Time::parse(String::from_utf8_lossy(field).trim()).map(|(_, kind)| kind));
    let kinds: Vec<Option<Kind>> = kinds.collect();
    // A guess for the example: the date, or else the last number, with the item beside it.
    let date = kinds.iter().position(|kind| *kind == Some(Kind::Date));
    let time = date.or(kinds.iter().rposition(Option::is_some)).unwrap_or(0) + 1;
    let example = match record.len() {
        0..3 => "user=1,item=2 where the lines are in the order of time".into(),
        fields if time < 3 => format!("user={},item={fields},time={time}", 3 - time),
        _ => format!("user=1,item=2,time={time}"),
    };
    format!(
        "{} fields and no header: {}; rule: three without a header, user, item and time, or the numbers of their \
         columns, for instance --columns {example}",
        record.len(),
        names(record),
    )
}

fn unknown_header(record: &ByteRecord, found: [&[usize]; 3], times: Times) -> String {
    let roles = ["user", "item", "time"];
    let needed = if times == Times::Needed { &roles[..] } else { &roles[..2] };
    let (missing, several): (Vec<_>, Vec<_>) = roles
        .into_iter()
        .zip(found)
        .filter(|(role, places)| places.len() > 1 || (places.is_empty() && needed.contains(role)))
        .partition(|(_, places)| places.is_empty());
    let listed = |roles: &[(&str, &[usize])]| roles.iter().map(|(role, _)| *role).collect::<Vec<_>>().join(", ");
    let problem = match (&missing[..], &several[..]) {
        (missing, []) => format!("no column is recognised as {}", listed(missing)),
        (_, several) => format!("more than one column may be {}", listed(several)),
    };
    let mut message = format!(
        "{problem}; the columns are {}; rule: names such as user_id, item_id and timestamp, or \
         --columns user=NAME,item=NAME,time=NAME",
        names(record)
    );
    if missing.iter().any(|(role, _)| *role == "time") {
        message += " (without time= where the lines are in the order of time)";
    }
    message
}

fn names(record: &ByteRecord) -> String {
    let names: Vec<String> = record.iter().map(|field| format!("{:?}", String::from_utf8_lossy(field))).collect();
    names.join(", ")
}

/// The places of the fields whose normalised names are `wanted`.
fn places(record: &ByteRecord, wanted: impl Fn(&String) -> bool) -> Vec<usize> {
    (0..record.len()).filter(|&place| wanted(&normalised(&record[place]))).collect()
}

fn is(list: &[&str], name: &str) -> bool {
    list.contains(&name)
}

fn normalised(field: &[u8]) -> String {
    let text = String::from_utf8_lossy(field);
    let name = text.split(':').next().unwrap_or_default();
    name.chars().filter(|c| !matches!(c, '_' | '-' | ' ')).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests;
