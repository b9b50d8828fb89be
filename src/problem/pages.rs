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
