//! Memory that is used and that is free, where the system says it (Linux). `examples/measure.rs` has this file too.

/// Peak of the process's resident memory so far in bytes.
pub fn peak() -> Option<u64> {
    of_file("/proc/self/status", "VmHWM:")
}

/// Refuses what needs more memory than there is, before an allocation fails: that would end the process without a word
/// on the option to change. `needed` is a number of bytes that no size of an option makes overflow.
pub fn check(needed: u128, what: &str, advice: &str) -> Result<(), String> {
    check_against(needed, of_file("/proc/meminfo", "MemAvailable:").unwrap_or(isize::MAX as u64), what, advice)
}

fn check_against(needed: u128, available: u64, what: &str, advice: &str) -> Result<(), String> {
    if needed <= u128::from(available) {
        return Ok(());
    }
    let gib = |bytes: f64| format!("{:.1} GiB", bytes / f64::from(1 << 30));
    let available = gib(available as f64);
    Err(format!("{what} needs about {} of memory; rule: the {available} that are free; {advice}", gib(needed as f64)))
}

fn of_file(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_more_than_is_free_is_refused() {
        assert!(check_against(1 << 30, 1 << 30, "the table", "lower --dim").is_ok());
        let error = check_against(3 << 29, 1 << 30, "the table", "lower --dim").unwrap_err();
        assert_eq!(error, "the table needs about 1.5 GiB of memory; rule: the 1.0 GiB that are free; lower --dim");
        assert!(check(u128::MAX, "the table", "lower --dim").is_err());
    }
}
