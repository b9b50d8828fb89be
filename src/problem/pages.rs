//! Huge pages for large results.

/// Below this, ordinary pages are soon there.
#[cfg(target_os = "linux")]
const LARGE: usize = 4 << 20;

/// The size of a huge page on the processors that the crate is tuned for; of another size, the request changes less.
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// Asks the system to give a large vector huge pages when it is first written. New memory comes page by page, each cleared
/// in an interrupt of its own; that took a quarter of a step that returns the gradient of 650,000 rows of a table
/// (`docs/design.md`). Nothing happens where the system has no huge pages.
pub(crate) fn ask_for_huge_pages<T>(values: &mut Vec<T>) {
    #[cfg(target_os = "linux")]
    {
        let bytes = size_of_val(values.as_slice());
        if bytes < LARGE {
            return;
        }
        let address = values.as_mut_ptr().addr();
        let first = address.next_multiple_of(HUGE_PAGE);
        let end = (address + bytes) / HUGE_PAGE * HUGE_PAGE;
        let pages = values.as_mut_ptr().map_addr(|_| first).cast();
        // SAFETY: the range lies within the vector's memory. The advice changes which pages hold it and none of its contents.
        // An error is no more than advice that was not taken.
        unsafe { libc::madvise(pages, end - first, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = values;
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::{HUGE_PAGE, LARGE, ask_for_huge_pages};

    /// Flags of the mapping that holds an address, as the kernel lists them.
    fn flags_at(address: usize) -> Option<String> {
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let mut holds = false;
        for line in maps.lines() {
            let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
            let bounds = range.map(|(from, to)| [from, to].map(|bound| usize::from_str_radix(bound, 16)));
            if let Some([Ok(from), Ok(to)]) = bounds {
                holds = (from..to).contains(&address);
            } else if let (true, Some(flags)) = (holds, line.strip_prefix("VmFlags:")) {
                return Some(flags.to_owned());
            }
        }
        None
    }

    #[test]
    fn large_vectors_are_advised_and_keep_what_they_hold() {
        for bytes in [0, 4, LARGE - 4, LARGE, LARGE + 4, 4 * LARGE + 4096] {
            let mut values = vec![0f32; bytes / 4];
            values.iter_mut().zip((0u16..1000).cycle()).for_each(|(value, i)| *value = i.into());
            ask_for_huge_pages(&mut values);
            assert!(values.iter().zip((0u16..1000).cycle()).all(|(value, i)| *value == f32::from(i)), "{bytes} bytes");
            let inside = (values.as_ptr().addr() + HUGE_PAGE).next_multiple_of(HUGE_PAGE);
            let has_huge_pages = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
            if let (true, true, Some(flags)) = (bytes > 2 * LARGE, has_huge_pages, flags_at(inside)) {
                assert!(flags.split_whitespace().any(|flag| flag == "hg"), "{flags}");
            }
        }
    }
}
