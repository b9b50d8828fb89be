//! Characters to tokens. Comments vanish; each token knows its line.
use super::ParseError;

#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// Identifier, also `%r1`, `$L__BB0_1`, `_Z3fooPf`.
    Word(String),
    /// `.word`, with `::` parts kept: `.shared::cta`, `.L2::128B`.
    Dot(String),
    Int(i128),
    F32(u32),
    F64(u64),
    Text(String),
    Sign(char),
}

#[derive(Debug, Clone)]
pub struct Lexed {
    pub token: Token,
    pub line: u32,
    /// No blank before it: tells `%tid.x` from a new directive.
    pub glued: bool,
}

pub fn lex(text: &str) -> Result<Vec<Lexed>, ParseError> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(text.len() / 4);
    let (mut i, mut line, mut glued) = (0, 1u32, false);
    while i < bytes.len() {
        let c = bytes[i];
        let fail = |what: String| ParseError { line, what };
        match c {
            b'\n' => {
                line += 1;
                i += 1;
                glued = false;
            }
            b' ' | b'\t' | b'\r' | 0 => {
                i += 1;
                glued = false;
            }
            b'/' if bytes.get(i + 1) == Some(&b'/') => {
                while i < bytes.len() && bytes[i] != b'\n' {
                    i += 1;
                }
            }
            b'/' if bytes.get(i + 1) == Some(&b'*') => {
                let end = text[i + 2..].find("*/").ok_or_else(|| fail("comment without an end".into()))?;
                line += bytes[i..i + 2 + end].iter().filter(|b| **b == b'\n').count() as u32;
                i += end + 4;
                glued = false;
            }
            b'"' => {
                let end = text[i + 1..].find('"').ok_or_else(|| fail("string without an end".into()))?;
                out.push(Lexed { token: Token::Text(text[i + 1..i + 1 + end].into()), line, glued });
                i += end + 2;
                glued = true;
            }
            b'.' if bytes.get(i + 1).is_some_and(|b| is_word(*b)) => {
                let end = word_end(bytes, i + 1);
                out.push(Lexed { token: Token::Dot(text[i + 1..end].into()), line, glued });
                i = end;
                glued = true;
            }
            b'0'..=b'9' => {
                let (token, end) = number(text, i).map_err(fail)?;
                out.push(Lexed { token, line, glued });
                i = end;
                glued = true;
            }
            b'%' | b'_' | b'$' | b'a'..=b'z' | b'A'..=b'Z' => {
                let end = word_end(bytes, i + 1);
                out.push(Lexed { token: Token::Word(text[i..end].into()), line, glued });
                i = end;
                glued = true;
            }
            b'{' | b'}' | b'[' | b']' | b'(' | b')' | b'<' | b'>' | b',' | b';' | b':' | b'+' | b'-' | b'@' | b'!'
            | b'|' | b'=' | b'~' | b'*' | b'/' | b'&' | b'^' => {
                out.push(Lexed { token: Token::Sign(c as char), line, glued });
                i += 1;
                glued = true;
            }
            _ => return Err(fail(format!("unexpected character {:?}", text[i..].chars().next().unwrap_or('?')))),
        }
    }
    Ok(out)
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_' || b == b'$'
}

/// End of a word that began before `i`; `::` between word characters belongs to it.
fn word_end(bytes: &[u8], mut i: usize) -> usize {
    loop {
        while i < bytes.len() && is_word(bytes[i]) {
            i += 1;
        }
        let double = bytes.get(i) == Some(&b':') && bytes.get(i + 1) == Some(&b':');
        if double && bytes.get(i + 2).is_some_and(|b| is_word(*b)) {
            i += 2;
        } else {
            return i;
        }
    }
}

fn number(text: &str, at: usize) -> Result<(Token, usize), String> {
    let bytes = text.as_bytes();
    let mut end = at;
    while end < bytes.len() && bytes[end].is_ascii_alphanumeric() {
        end += 1;
    }
    let word = &text[at..end];
    let low = word.to_ascii_lowercase();
    let bad = |_| format!("bad number {word}");
    if let Some(hex) = low.strip_prefix("0f").filter(|h| h.len() == 8) {
        return Ok((Token::F32(u32::from_str_radix(hex, 16).map_err(bad)?), end));
    }
    if let Some(hex) = low.strip_prefix("0d").filter(|h| h.len() == 16) {
        return Ok((Token::F64(u64::from_str_radix(hex, 16).map_err(bad)?), end));
    }
    // A decimal float such as 1.5 or 2.0e-3.
    let decimal_point = bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit);
    if decimal_point {
        end += 1;
        while end < bytes.len() && (bytes[end].is_ascii_alphanumeric()) {
            end += 1;
            if matches!(bytes[end - 1], b'e' | b'E') && matches!(bytes.get(end), Some(b'-' | b'+')) {
                end += 1;
            }
        }
        let value: f64 = text[at..end].parse().map_err(|_| format!("bad number {}", &text[at..end]))?;
        return Ok((Token::F64(value.to_bits()), end));
    }
    let low = low.trim_end_matches('u');
    let value = match low {
        _ if low.starts_with("0x") => u64::from_str_radix(&low[2..], 16).map_err(bad)?,
        _ if low.starts_with("0b") => u64::from_str_radix(&low[2..], 2).map_err(bad)?,
        _ if low.len() > 1 && low.starts_with('0') => u64::from_str_radix(&low[1..], 8).map_err(bad)?,
        _ => low.parse().map_err(bad)?,
    };
    Ok((Token::Int(value as i128), end))
}
