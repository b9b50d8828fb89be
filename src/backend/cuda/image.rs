//! The compiled kernels, as build.rs left them: fat binaries, empty where there was no compiler; and which driver they need.

use crate::error::NotBuilt;

// NOT_BUILT: why the images are empty. KERNELS: what they hold.
include!(concat!(env!("OUT_DIR"), "/built.rs"));

/// What built the kernels, and for which architectures: `sm_80` is machine code, `compute_80` PTX.
pub(super) struct Kernels {
    pub(super) nvcc: (i32, i32),
    /// Whether nvcc compressed them for size.
    pub(super) compressed: bool,
    pub(super) portable: &'static [&'static str],
    pub(super) hopper: &'static [&'static str],
}

/// cudarc's bindings know no older driver: version 11.4.
const OLDEST_DRIVER: i32 = 11040;
/// No older driver reads what `nvcc -compress-mode` writes, as nvcc's documentation says: version 12.4.
const OLDEST_DRIVER_FOR_COMPRESSED: i32 = 12040;

impl Kernels {
    /// The oldest driver that runs the kernels on a device of that compute capability, as drivers report versions.
    ///
    /// Drivers run machine code of every toolkit of their major version ("minor version compatibility"). PTX is compiled by
    /// the driver, which must be as new as the nvcc that wrote it.
    pub(super) fn driver_version(&self, (major, minor): (i32, i32)) -> i32 {
        let hopper = if (major, minor) == (9, 0) { self.hopper } else { &[] };
        let runs = |name: &&str| {
            let number = name.strip_prefix("sm_").and_then(|number| number.trim_end_matches('a').parse::<i32>().ok());
            number.is_some_and(|number| number / 10 == major && number % 10 <= minor)
        };
        let machine_code = self.portable.iter().any(runs) && (hopper.is_empty() || hopper.iter().any(runs));
        let (toolkit, release) = self.nvcc;
        let oldest = if self.compressed { OLDEST_DRIVER_FOR_COMPRESSED } else { OLDEST_DRIVER };
        oldest.max(1000 * toolkit + if machine_code { 0 } else { 10 * release })
    }
}

/// The driver wants images aligned.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

macro_rules! image {
    ($name:ident, $stem:literal) => {
        pub(super) static $name: &[u8] = {
            static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $stem, ".fatbin")));
            &IMAGE.0
        };
    };
}

image!(ROWS, "rows");
image!(RESOLVE, "resolve");
image!(STREAM_SM80, "stream_sm80");
image!(STATISTICS_SM90A, "statistics_sm90a");
image!(OUTPUT_SM90A, "output_sm90a");
image!(WIDE_STATISTICS_SM90A, "wide_statistics_sm90a");
image!(WIDE_PANEL_SM90A, "wide_panel_sm90a");
image!(WIDE_OUTPUT_SM90A, "wide_output_sm90a");
image!(POSITIVES, "positives");
image!(FINISH_ROWS, "finish_rows");
image!(BOUNDS, "bounds");
image!(OWN_NEGATIVES, "own_negatives");
image!(CHECK_ROWS, "check_rows");
image!(SORT_USES, "sort_uses");
image!(FINISH_TABLE, "finish_table");
image!(FINISH_GRADIENT, "finish_gradient");
image!(TOPK, "topk");
image!(ENQUEUE, "enqueue");
image!(ACCUMULATE, "accumulate");
image!(SYMMETRIC, "symmetric");

#[cfg(test)]
mod tests {
    use super::Kernels;

    const KERNELS: Kernels = Kernels {
        nvcc: (12, 6),
        compressed: false,
        portable: &["sm_80", "sm_90", "sm_120", "compute_80"],
        hopper: &["sm_90a"],
    };

    #[test]
    fn compressed_kernels_need_a_driver_that_reads_them() {
        let compressed = Kernels { nvcc: (12, 8), compressed: true, ..KERNELS };
        assert_eq!(compressed.driver_version((8, 0)), 12040, "machine code");
        assert_eq!(compressed.driver_version((10, 0)), 12080, "PTX");
        let later = Kernels { nvcc: (13, 1), ..compressed };
        assert_eq!(later.driver_version((8, 0)), 13000);
    }

    #[test]
    fn machine_code_needs_a_driver_of_the_toolkits_major_version() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)] {
            assert_eq!(KERNELS.driver_version(capability), 12000, "{capability:?}");
        }
    }

    #[test]
    fn ptx_needs_a_driver_as_new_as_the_toolkit() {
        assert_eq!(KERNELS.driver_version((10, 0)), 12060, "no machine code of that major version");
        let newer = Kernels { portable: &["sm_86", "compute_80"], ..KERNELS };
        assert_eq!(newer.driver_version((8, 0)), 12060, "machine code of a later minor version does not run");
        assert_eq!(newer.driver_version((8, 9)), 12000);
        let hopper = Kernels { hopper: &["compute_90a"], ..KERNELS };
        assert_eq!(hopper.driver_version((9, 0)), 12060, "a device of capability 9.0 loads Hopper's kernels too");
        assert_eq!(hopper.driver_version((8, 0)), 12000, "another device does not");
        let none = Kernels { hopper: &[], ..KERNELS };
        assert_eq!(none.driver_version((9, 0)), 12000);
    }

    #[test]
    fn no_driver_older_than_the_bindings_serves() {
        let old = Kernels { nvcc: (11, 1), ..KERNELS };
        assert_eq!(old.driver_version((8, 0)), 11040);
    }
}
