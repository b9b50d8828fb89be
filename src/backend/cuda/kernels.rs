//! The only list of all kernels: where each one is, its variants, and the struct that it takes.

use std::marker::PhantomData;

use super::driver::{HOPPER_THREADS, THREADS};
use super::image;
use super::params::{
    AccumulateParams, BoundsParams, CheckRowsParams, EnqueueParams, FindHitsParams, FinishGradientParams,
    FinishRowsParams, FinishTableParams, HopperParams, ListUsesParams, MergeTopKParams, OwnNegativesParams,
    PlacePositivesParams, PlaceRowsParams, PrepareRowsParams, SortUsesParams, StreamParams, SymmetricParams,
    TopKParams, TotalsParams, WideParams,
};
use crate::problem::embeddings::DType;

/// A kernel in all its variants, of which each takes a `P` by value.
pub(super) struct Kernel<P> {
    /// Its place in [`ENTRIES`].
    pub(super) place: usize,
    params: PhantomData<fn(P)>,
}

impl<P> Clone for Kernel<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Kernel<P> {}

/// Which of a kernel's variants: `NAME_WIDTH_TYPE` in full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Variant {
    pub(super) width: usize,
    pub(super) element: usize,
}

/// By how many chunks of output columns, or of a row, a kernel takes. The first is for kernels with one width.
pub(super) const WIDTHS: [&str; 4] = ["", "_1", "_2", "_4"];
/// By type of elements, and for f32 also of products. The first is for kernels that do not depend on the type.
pub(super) const ELEMENTS: [&str; 5] = ["", "_f16", "_bf16", "_f32", "_tf32"];

impl Variant {
    /// The one variant of a kernel that has no others.
    pub(super) const ONLY: Variant = Variant { width: 0, element: 0 };

    pub(super) fn of(dtype: DType) -> Self {
        let element = match dtype {
            DType::F16 => 1,
            DType::Bf16 => 2,
            DType::F32 => 3,
        };
        Variant { width: 0, element }
    }

    /// Where products of f32 are those of tf32.
    pub(super) const TF32: Variant = Variant { width: 0, element: 4 };

    /// Of `chunks` of columns: 1, 2 or 4; 0 where the kernel has one width.
    pub(super) fn chunks(self, chunks: usize) -> Self {
        let width = match chunks {
            0..=2 => chunks,
            _ => 3,
        };
        Variant { width, ..self }
    }
}

/// A kernel's name without its variants', and what there is of it.
pub(super) struct Entry {
    pub(super) image: &'static [u8],
    pub(super) name: &'static str,
    widths: &'static [usize],
    elements: &'static [usize],
}

impl Entry {
    /// Whether only devices of compute capability 9.0 run it.
    pub(super) fn is_hopper(&self) -> bool {
        self.name.starts_with("stream_hopper_")
    }

    /// Of a block.
    pub(super) fn threads(&self, variant: Variant) -> u32 {
        // A warp has two slabs of stationary rows in place of one (`stream_sm80.cu`).
        let has_two_slabs = match self.name {
            "stream_statistics" => true,
            "stream_expected" | "stream_gradient" => match WIDTHS[variant.width] {
                "_1" => true,
                "_2" => matches!(ELEMENTS[variant.element], "_f16" | "_bf16"),
                _ => false,
            },
            _ => false,
        };
        match (self.is_hopper(), has_two_slabs) {
            (true, _) => HOPPER_THREADS,
            (false, true) => THREADS / 2,
            (false, false) => THREADS,
        }
    }

    pub(super) fn variants(&self) -> impl Iterator<Item = (Variant, String)> {
        let both = self.widths.iter().flat_map(|&width| self.elements.iter().map(move |&element| (width, element)));
        both.map(|(width, element)| {
            (Variant { width, element }, format!("{}{}{}", self.name, WIDTHS[width], ELEMENTS[element]))
        })
    }
}

macro_rules! kernels {
    ($($image:ident { $($constant:ident, $name:literal, $params:ty, $widths:expr, $elements:expr;)* })*) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        enum Place { $($($constant),*),* }
        $($(pub(super) const $constant: Kernel<$params> =
            Kernel { place: Place::$constant as usize, params: PhantomData };)*)*
        /// All kernels, those of an image side by side.
        pub(super) const ENTRIES: &[Entry] = &[$($(
            Entry { image: image::$image, name: $name, widths: $widths, elements: $elements }
        ),*),*];
    };
}

const ONE: &[usize] = &[0];
/// Of as many chunks of columns as the name says.
const CHUNKS: &[usize] = &[1, 2, 3];
const UNTYPED: &[usize] = &[0];
const TYPED: &[usize] = &[1, 2, 3];
const STREAMED: &[usize] = &[1, 2, 3, 4];
const OF_16_BITS: &[usize] = &[1, 2];
const BF16: &[usize] = &[2];

kernels! {
    ROWS {
        PREPARE_ROWS, "prepare_rows", PrepareRowsParams, ONE, TYPED;
    }
    POSITIVES {
        PLACE_POSITIVES, "place_positives", PlacePositivesParams, ONE, UNTYPED;
    }
    RESOLVE {
        FIND_HITS, "find_hits", FindHitsParams, ONE, UNTYPED;
    }
    BOUNDS {
        BOUNDS, "bounds", BoundsParams, ONE, TYPED;
    }
    STREAM_SM80 {
        STATISTICS, "stream_statistics", StreamParams, ONE, STREAMED;
        DETAIL, "stream_detail", StreamParams, ONE, STREAMED;
        PAIRED, "stream_paired", StreamParams, ONE, STREAMED;
        EXPECTED, "stream_expected", StreamParams, CHUNKS, STREAMED;
        GRADIENT, "stream_gradient", StreamParams, CHUNKS, STREAMED;
    }
    CHECK_ROWS {
        CHECK_ROWS, "check_rows", CheckRowsParams, ONE, UNTYPED;
    }
    OWN_NEGATIVES {
        OWN_NEGATIVES, "stream_own", OwnNegativesParams, ONE, TYPED;
    }
    STATISTICS_SM90A {
        HOPPER_STATISTICS, "stream_hopper_statistics", HopperParams, CHUNKS, OF_16_BITS;
        HOPPER_BOUNDED, "stream_hopper_bounded", HopperParams, CHUNKS, OF_16_BITS;
    }
    OUTPUT_SM90A {
        HOPPER_EXPECTED, "stream_hopper_expected", HopperParams, CHUNKS, OF_16_BITS;
        HOPPER_GRADIENT, "stream_hopper_gradient", HopperParams, CHUNKS, OF_16_BITS;
        HOPPER_BOUNDED_EXPECTED, "stream_hopper_bounded_expected", HopperParams, CHUNKS, BF16;
    }
    WIDE_STATISTICS_SM90A {
        WIDE_STATISTICS, "stream_hopper_wide_statistics", WideParams, ONE, OF_16_BITS;
        WIDE_BOUNDED, "stream_hopper_wide_bounded", WideParams, ONE, OF_16_BITS;
    }
    WIDE_PANEL_SM90A {
        WIDE_EXPECTED, "stream_hopper_wide_expected", WideParams, ONE, OF_16_BITS;
        WIDE_GRADIENT, "stream_hopper_wide_gradient", WideParams, ONE, OF_16_BITS;
    }
    WIDE_OUTPUT_SM90A {
        WIDE_OUTPUT, "stream_hopper_wide_output", WideParams, ONE, OF_16_BITS;
    }
    FINISH_ROWS {
        FINISH_ROWS, "finish_rows", FinishRowsParams, ONE, TYPED;
    }
    FINISH_GRADIENT {
        FINISH_GRADIENT, "finish_gradient", FinishGradientParams, ONE, TYPED;
        FINISH_TOTALS, "finish_totals", TotalsParams, ONE, UNTYPED;
    }
    SORT_USES {
        LIST_USES, "list_uses", ListUsesParams, ONE, UNTYPED;
        SORT_COUNT, "sort_count", SortUsesParams, ONE, UNTYPED;
        SORT_PLACES, "sort_places", SortUsesParams, ONE, UNTYPED;
        SORT_SCATTER, "sort_scatter", SortUsesParams, ONE, UNTYPED;
        COUNT_ROWS, "count_rows", PlaceRowsParams, ONE, UNTYPED;
        PLACE_ROWS, "place_rows", PlaceRowsParams, ONE, UNTYPED;
        EVERY_ROW, "every_row", PlaceRowsParams, ONE, UNTYPED;
    }
    FINISH_TABLE {
        SUM_SEGMENTS, "sum_segments", FinishTableParams, ONE, TYPED;
        FINISH_TABLE, "finish_table", FinishTableParams, ONE, TYPED;
    }
    TOPK {
        TOPK, "stream_topk", TopKParams, ONE, STREAMED;
        MERGE_TOPK, "merge_topk", MergeTopKParams, ONE, UNTYPED;
    }
    ENQUEUE {
        ENQUEUE_ROWS, "enqueue_rows", EnqueueParams, ONE, UNTYPED;
    }
    ACCUMULATE {
        ACCUMULATE, "accumulate", AccumulateParams, ONE, UNTYPED;
    }
    SYMMETRIC {
        AVERAGE_DIRECTIONS, "average_directions", SymmetricParams, ONE, UNTYPED;
    }
}
