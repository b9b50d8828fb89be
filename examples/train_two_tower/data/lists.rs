//! Files of lists, as the LightGCN splits of Gowalla, Yelp and Amazon have: lines of a user and all of the user's
//! items, with spaces between. The items are taken in the order of the line.

use super::lines::Lines;
use super::times::Time;
use super::{Contents, Interaction, Names};
use crate::Fallible;

/// Whether a file with such a first line is one of lists: of nothing but whole numbers, two at least.
pub fn begins(line: &[u8]) -> bool {
    let fields = || line.split(u8::is_ascii_whitespace).filter(|field| !field.is_empty());
    fields().count() > 1 && fields().all(|field| field.iter().all(u8::is_ascii_digit))
}

/// `first` is the first line with its number.
pub fn read(first: (usize, &[u8]), mut lines: Lines, names: &mut Names) -> Fallible<Contents> {
    let mut interactions = Vec::new();
    let mut all_have_three = true;
    let mut add = |line: &[u8], number: usize| -> Fallible<()> {
        let text = std::str::from_utf8(line).map_err(|_| format!("line {number} is not UTF-8"))?;
        let mut fields = text.split_ascii_whitespace();
        let user = names.users.index(fields.next().unwrap_or_default());
        let before = interactions.len();
        interactions.extend(fields.map(|item| Interaction { user, item: names.items.index(item), time: Time::NONE }));
        all_have_three &= interactions.len() - before == 2;
        Ok(())
    };
    add(first.1, first.0)?;
    while let Some((number, line)) = lines.next()? {
        add(line, number)?;
    }
    // Lists of two items each would be a strange coincidence.
    if all_have_three {
        return Err(
            "every line has three fields with spaces between, as user, item and time have, and as lists of a user and \
                    two items have; --separator space takes them for user, item and time"
                .into(),
        );
    }
    Ok(Contents { interactions, bad_lines: 0, layout: "a user and the user's items in each line".into() })
}
