//! The lines of a file, plain or gzipped, whatever wrote it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use crate::Fallible;

/// Longer lines are no lines: without a limit, one of a file without line ends would be read into memory whole.
const LONGEST: usize = 16 << 20;

pub struct Lines {
    input: Box<dyn BufRead>,
    number: usize,
    line: Vec<u8>,
}

impl Lines {
    pub fn open(path: &Path) -> Fallible<Self> {
        let mut file = BufReader::new(File::open(path)?);
        let gzipped = file.fill_buf()?.starts_with(&[0x1f, 0x8b]);
        Ok(if gzipped { Lines::new(BufReader::new(MultiGzDecoder::new(file))) } else { Lines::new(file) })
    }

    pub fn new(input: impl BufRead + 'static) -> Self {
        Lines { input: Box::new(input), number: 0, line: Vec::new() }
    }

    /// The next line that is not blank, with its number from 1 and without its end.
    pub fn next(&mut self) -> Fallible<Option<(usize, &[u8])>> {
        loop {
            self.line.clear();
            let limited = &mut self.input.by_ref().take(LONGEST as u64 + 1);
            if limited.read_until(b'\n', &mut self.line)? == 0 {
                return Ok(None);
            }
            self.number += 1;
            if self.number == 1 {
                self.first()?;
            }
            if self.line.len() > LONGEST {
                return Err(format!("line {} is longer than {} MiB", self.number, LONGEST >> 20).into());
            }
            if self.line.ends_with(b"\n") {
                self.line.pop();
            }
            if self.line.ends_with(b"\r") {
                self.line.pop();
            }
            if !self.line.trim_ascii().is_empty() {
                break;
            }
        }
        Ok(Some((self.number, &self.line)))
    }

    /// Takes off a byte-order mark, and refuses files of other encodings and line ends.
    fn first(&mut self) -> Fallible<()> {
        let line = &mut self.line;
        if line.starts_with(&[0xff, 0xfe]) || line.starts_with(&[0xfe, 0xff]) {
            return Err("the file is UTF-16; rule: UTF-8, as `iconv -f UTF-16 -t UTF-8` writes it".into());
        }
        if line.starts_with(b"PK\x03\x04") {
            return Err("the file is a zip archive; rule: text, plain or gzipped".into());
        }
        if line.contains(&0) {
            return Err("line 1 has a zero byte, as UTF-16 and binary files have; rule: UTF-8, plain or gzipped".into());
        }
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        if text.strip_suffix(b"\r").unwrap_or(text).contains(&b'\r') {
            return Err("line 1 has a carriage return inside; rule: lines end with a line feed, which \
                        `tr '\\r' '\\n'` makes of lone carriage returns"
                .into());
        }
        if line.starts_with(&[0xef, 0xbb, 0xbf]) {
            line.drain(..3);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &'static [u8]) -> Result<Vec<(usize, String)>, String> {
        let (mut lines, mut all) = (Lines::new(bytes), Vec::new());
        while let Some((number, line)) = lines.next().map_err(|e| e.to_string())? {
            all.push((number, String::from_utf8_lossy(line).into_owned()));
        }
        Ok(all)
    }

    #[test]
    fn ends_and_marks_belong_to_no_line() {
        let expected = [(1, "a,1".to_string()), (3, " b\t".to_string()), (5, "c".to_string())];
        assert_eq!(lines(b"a,1\n\n b\t\n \t\nc").unwrap(), expected);
        assert_eq!(lines(b"\xef\xbb\xbfa,1\r\n\r\n b\t\r\n\r\nc\r\n").unwrap(), expected);
        assert_eq!(lines(b"").unwrap(), []);
    }

    #[test]
    fn other_files_are_named() {
        for (bytes, message) in [
            (&b"\xff\xfeu\0,\0"[..], "the file is UTF-16"),
            (b"\xfe\xff\0u\0,", "the file is UTF-16"),
            (b"u\0,\0a\0\n\0", "line 1 has a zero byte"),
            (b"PK\x03\x04\x14\0", "the file is a zip archive"),
            (b"u,a,1\ru,b,2\r", "line 1 has a carriage return inside"),
            (b"u,a,1\ru,b,2\r\n", "line 1 has a carriage return inside"),
        ] {
            let error = lines(bytes).unwrap_err();
            assert!(error.starts_with(message) && error.contains("; rule: "), "{error}");
        }
    }

    #[test]
    fn a_line_without_an_end_is_not_read_whole() {
        let endless = BufReader::new(std::io::repeat(b'x'));
        let error = Lines::new(endless).next().unwrap_err().to_string();
        assert_eq!(error, "line 1 is longer than 16 MiB");
    }
}
