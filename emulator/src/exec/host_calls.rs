//! printf and assert of device code.
use super::access::lanes;
use super::machine::{LOCAL_WINDOW, Machine, WINDOW_MASK};
use super::warp::Warp;

/// A parameter of a call in a lane's local memory.
fn parameter<const N: usize>(w: &Warp, lane: usize, at: u32) -> Result<[u8; N], String> {
    let from = lane * w.local_stride + at as usize;
    w.local
        .get(from..from + N)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| "a parameter lies outside local memory".into())
}

fn bytes<const N: usize>(m: &mut Machine, w: &Warp, lane: usize, at: u64) -> Result<[u8; N], String> {
    if at & WINDOW_MASK == LOCAL_WINDOW {
        return parameter(w, lane, at as u32);
    }
    let mut out = [0; N];
    m.read_generic(at, &mut out)?;
    Ok(out)
}

fn text(m: &mut Machine, w: &Warp, lane: usize, mut at: u64) -> Result<String, String> {
    let mut out = vec![];
    loop {
        let [b] = bytes(m, w, lane, at)?;
        if b == 0 || out.len() > 4096 {
            return Ok(String::from_utf8_lossy(&out).into_owned());
        }
        out.push(b);
        at += 1;
    }
}

pub fn printf(
    m: &mut Machine,
    w: &mut Warp,
    format: u32,
    arguments: u32,
    result: Option<u32>,
    mask: u32,
) -> Result<(), String> {
    for lane in lanes(mask) {
        let format = u64::from_le_bytes(parameter(w, lane, format)?);
        let arguments = u64::from_le_bytes(parameter(w, lane, arguments)?);
        let format = text(m, w, lane, format)?;
        let (words, count) = formatted(m, w, lane, &format, arguments)?;
        print!("{words}");
        if let Some(at) = result {
            let from = lane * w.local_stride + at as usize;
            w.local[from..from + 4].copy_from_slice(&(count as i32).to_le_bytes());
        }
    }
    Ok(())
}

fn formatted(m: &mut Machine, w: &Warp, lane: usize, format: &str, mut at: u64) -> Result<(String, usize), String> {
    let mut out = String::new();
    let mut count = 0;
    let mut rest = format.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut spec = String::new();
        let kind = loop {
            match rest.next() {
                Some(c) if c.is_ascii_alphabetic() && !"lhzjt".contains(c) || c == '%' => break c,
                Some(c) => spec.push(c),
                None => return Ok((out + "%" + &spec, count)),
            }
        };
        if kind == '%' {
            out.push('%');
            continue;
        }
        count += 1;
        let long = spec.contains(['l', 'z', 'j', 't']) || "sp".contains(kind) || "feEgGaA".contains(kind);
        let size = if long { 8 } else { 4 };
        at = at.next_multiple_of(size);
        let raw = if long {
            u64::from_le_bytes(bytes(m, w, lane, at)?)
        } else {
            u32::from_le_bytes(bytes(m, w, lane, at)?) as u64
        };
        at += size;
        let flags: String = spec.chars().filter(|c| !"lhzjt".contains(*c)).collect();
        let (width, precision) = match flags.split_once('.') {
            Some((a, b)) => (a, b.parse().ok()),
            None => (flags.as_str(), None),
        };
        let signed = if long { raw as i64 } else { raw as u32 as i32 as i64 };
        let body = match kind {
            'd' | 'i' => signed.to_string(),
            'u' => raw.to_string(),
            'x' => format!("{raw:x}"),
            'X' => format!("{raw:X}"),
            'o' => format!("{raw:o}"),
            'p' => format!("{raw:#x}"),
            'c' => (raw as u8 as char).to_string(),
            's' => text(m, w, lane, raw)?,
            'e' | 'E' => format!("{:.*e}", precision.unwrap_or(6), f64::from_bits(raw)),
            'g' | 'G' if precision.is_none() => format!("{}", f64::from_bits(raw)),
            _ => format!("{:.*}", precision.unwrap_or(6), f64::from_bits(raw)),
        };
        let left = width.contains('-');
        let zero = width.trim_start_matches(['+', ' ', '#']).starts_with('0') && !left;
        let n: usize = width.trim_start_matches(['+', ' ', '#', '-', '0']).parse().unwrap_or(0);
        let fill = n.saturating_sub(body.chars().count());
        match (left, zero) {
            (true, _) => out += &(body + &" ".repeat(fill)),
            (_, true) if body.starts_with('-') => out += &("-".to_string() + &"0".repeat(fill) + &body[1..]),
            (_, true) => out += &("0".repeat(fill) + &body),
            _ => out += &(" ".repeat(fill) + &body),
        }
    }
    Ok((out, count))
}

/// __assertfail(message, file, line, function, char size): a fault with its words.
pub fn assert_fail(m: &mut Machine, w: &mut Warp, parameters: &[u32], mask: u32) -> Result<(), String> {
    let lane = mask.trailing_zeros() as usize;
    w.fault_lane = Some(lane);
    let [message, file, line, function, ..] = parameters else { return Err("assertion failed".into()) };
    let mut word = |at: u32| -> Result<String, String> {
        let at = u64::from_le_bytes(parameter(w, lane, at)?);
        text(m, w, lane, at)
    };
    let (message, file, function) = (word(*message)?, word(*file)?, word(*function)?);
    let line = u32::from_le_bytes(parameter(w, lane, *line)?);
    Err(format!("{file}:{line}: {function}: assertion `{message}` failed"))
}
