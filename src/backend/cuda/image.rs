//! The compiled kernels, as build.rs left them: fat binaries, empty where there was no compiler.

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
image!(TERMS, "terms");
image!(STREAM_SM80, "stream_sm80");
image!(STATISTICS_SM90A, "statistics_sm90a");
image!(OUTPUT_SM90A, "output_sm90a");
image!(WIDE_STATISTICS_SM90A, "wide_statistics_sm90a");
image!(WIDE_PANEL_SM90A, "wide_panel_sm90a");
image!(WIDE_OUTPUT_SM90A, "wide_output_sm90a");
image!(POSITIVES, "positives");
image!(MERGE, "merge");
image!(TOPK, "topk");
image!(EPILOGUE, "epilogue");
image!(ENQUEUE, "enqueue");
image!(SYMMETRIC, "symmetric");
