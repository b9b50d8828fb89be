//! What stands between the fields of a line, and the fields.

use std::str::FromStr;

use csv::ByteRecord;

/// One character, or several as in `::`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Separator(String);

/// Those that are recognised. A space is none of them: it may stand in names, and lists of items are written with it.
const DETECTED: [&str; 5] = ["::", "\t", ";", ",", "|"];

impl FromStr for Separator {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = match text {
            "\\t" | "tab" => "\t",
            "space" => " ",
            text => text,
        };
        if text.is_empty() || text.contains(['"', '\n', '\r']) {
            return Err(
                "rule: a character or several, such as , or ; or :: or \\t or space; no quote, no line end".into()
            );
        }
        Ok(Separator(text.into()))
    }
}

impl Separator {
    /// Takes a line apart, without the end of the line. A field in quotes may hold the separator where that is one
    /// byte; it may not hold the end of the line.
    pub fn split(&self, line: &[u8], record: &mut ByteRecord) -> Result<(), csv::Error> {
        record.clear();
        match *self.0.as_bytes() {
            [byte] if line.contains(&b'"') => {
                let mut reader = csv::ReaderBuilder::new();
                // A lone carriage return would end the record, and what follows would be lost.
                reader.has_headers(false).delimiter(byte).terminator(csv::Terminator::Any(b'\n'));
                reader.from_reader(line).read_byte_record(record)?;
            }
            // What the parser would do, without the cost of a parser per line.
            [byte] => record.extend(line.split(|&b| b == byte)),
            _ => {
                let mut rest = line;
                while let Some(at) = rest.windows(self.0.len()).position(|window| window == self.0.as_bytes()) {
                    record.push_field(&rest[..at]);
                    rest = &rest[at + self.0.len()..];
                }
                record.push_field(rest);
            }
        }
        Ok(())
    }

    /// As it is given on the command line.
    pub fn shown(&self) -> String {
        self.0.replace('\t', "\\t")
    }

    /// The separator of a file by its first line: the one of whose fields `is_header` knows the names, else the only
    /// one that makes three fields or more, else the only one that makes two. Nothing where there is none.
    pub fn detect(line: &[u8], is_header: impl Fn(&ByteRecord) -> bool) -> Result<Option<Separator>, String> {
        let mut found = Vec::new();
        for text in DETECTED {
            let (separator, mut record) = (Separator(text.into()), ByteRecord::new());
            separator.split(line, &mut record).map_err(|e| e.to_string())?;
            if is_header(&record) {
                return Ok(Some(separator));
            }
            found.push((record.len(), separator));
        }
        for least in [3, 2] {
            let mut enough = found.iter().filter(|(fields, _)| *fields >= least).map(|(_, separator)| separator);
            if let Some(first) = enough.next() {
                return match enough.next() {
                    None => Ok(Some(first.clone())),
                    Some(second) => Err(format!(
                        "the fields may be separated by {:?} or by {:?}; --separator says by which",
                        first.shown(),
                        second.shown()
                    )),
                };
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(separator: &str, line: &str) -> Vec<String> {
        let mut record = ByteRecord::new();
        separator.parse::<Separator>().unwrap().split(line.as_bytes(), &mut record).unwrap();
        record.iter().map(|field| String::from_utf8(field.to_vec()).unwrap()).collect()
    }

    #[test]
    fn a_line_is_taken_apart() {
        assert_eq!(fields(",", "u,a,1"), ["u", "a", "1"]);
        assert_eq!(fields(",", "\"u, v\",\"a\"\"b\",1"), ["u, v", "a\"b", "1"]);
        assert_eq!(fields(",", "\"u\",a,1\rv,b,2"), ["u", "a", "1\rv", "b", "2"]);
        assert_eq!(fields("\\t", "u\ta, b\t"), ["u", "a, b", ""]);
        assert_eq!(fields("tab", "\"u\tv\"\ta"), ["u\tv", "a"]);
        assert_eq!(fields("::", "1::10:0::5::"), ["1", "10:0", "5", ""]);
        assert_eq!(fields("space", "1 2"), ["1", "2"]);
        for bad in ["", "\"", "\n", ",\r"] {
            assert!(bad.parse::<Separator>().unwrap_err().starts_with("rule: a character"), "{bad:?}");
        }
    }

    #[test]
    fn the_first_line_tells_the_separator() {
        let known = |record: &ByteRecord| record.iter().any(|field| field == b"user_id");
        let detect = |line: &str| Separator::detect(line.as_bytes(), known).map(|found| found.map(|s| s.shown()));
        for (line, separator) in [
            ("1,10,5,100", ","),
            ("1::10::5::100", "::"),
            ("196\t242\t3\t881250949", "\\t"),
            ("u;i;1,5", ";"),
            ("u;i;5;2010-10-19 23:55:27", ";"),
            ("user_id:token\titem_id:token\ttimestamp:float", "\\t"),
            ("user_id,item_id,a|b|c,timestamp", ","),
            ("\"u;v;w\",a,1", ","),
            ("u,i", ","),
            ("u|i|1", "|"),
        ] {
            assert_eq!(detect(line), Ok(Some(separator.into())), "{line}");
        }
        assert_eq!(detect("1 10 100"), Ok(None));
        assert_eq!(
            detect("1,2,3;4;5").unwrap_err(),
            "the fields may be separated by \";\" or by \",\"; --separator says by which"
        );
    }
}
