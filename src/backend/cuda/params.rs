//! Kernel arguments, field by field as in `kernels/*/*_params.h`, where each is explained. A test compares the names, the
//! places and the types of all fields with the headers.
//!
//! Addresses are device addresses; 0 is the null pointer.

#[cfg(test)]
mod tests;

/// A kernel's argument: plain data that the driver copies at the launch.
pub(super) trait Params: Copy {}

macro_rules! params {
    ($(#[$doc:meta])* $name:ident, $size:expr, { $($field:ident: $t:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Default)]
        pub(super) struct $name { $(pub(super) $field: $t),* }
        const _: () = assert!(size_of::<$name>() == $size);
        impl Params for $name {}
        #[cfg(test)]
        impl tests::Mirrored for $name {
            const NAME: &'static str = stringify!($name);
            /// Name, offset and size.
            fn fields() -> Vec<(&'static str, usize, usize)> {
                vec![$((stringify!($field), std::mem::offset_of!($name, $field), size_of::<$t>())),*]
            }
        }
    };
}

/// Values of `RowSet::output_factor`.
pub(super) const OUTPUT_PLAIN: u32 = 1;
pub(super) const OUTPUT_FOLDED: u32 = 2;

/// Elements of a row that a lane holds at a time (`lanes.cuh`).
pub(super) const HELD: u32 = 8;

/// The lowest bit of the row in an entry of a list of uses.
pub(super) const USE_BITS: u32 = 33;
/// Entries that a block sorts (`sort_uses.cu`).
pub(super) const SORT_TILE: u32 = 4096;
/// Uses among which a warp looks for the first ones of rows, and uses of one row that are added up apart (`finish_table.cu`).
pub(super) const USES_OF_WARP: u32 = 16;
pub(super) const SEGMENT: u32 = 64;

params!(
    /// `key_table_params.h`
    KeyTable, 5 * 8, { keys: u64, first: u64, last: u64, rows: u64, capacity: u64 }
);

params!(
    /// `rows_params.h`
    RowSet, 10 * 8 + 4 * 4, {
        embeddings: u64,
        indices: u64,
        log_q: u64,
        inverse_norm: u64,
        row_terms: u64,
        columns: u64,
        output_columns: u64,
        rows: u64,
        stride: u64,
        start: u64,
        scale: f32,
        shift: f32,
        output_shift: f32,
        output_factor: u32,
    }
);

params!(
    /// `rows_params.h`
    PrepareRowsParams, 3 * 96 + 40 + 3 * 8, { sets: [RowSet; 3], keys: KeyTable, fault: u64, dim: u64, cosine: u64 }
);

params!(
    /// `positives_params.h`
    PlacePositivesParams, 21 * 8 + 40 + 5 * 8 + 4 * 4, {
        base: u64,
        base_indices: u64,
        base_inverse_norm: u64,
        positives: u64,
        positive_offsets: u64,
        candidate_ids: u64,
        candidate_log_q: u64,
        separate_ids: u64,
        pair_offsets: u64,
        pair_rows: u64,
        addresses: u64,
        inverse_norm: u64,
        terms: u64,
        positive_ids: u64,
        positive_log_q: u64,
        exclude_offsets: u64,
        exclude_ids: u64,
        row_weight: u64,
        weight_sums: u64,
        query_of: u64,
        swapped_weight: u64,
        keys: KeyTable,
        fault: u64,
        stride: u64,
        start: u64,
        count: u64,
        candidates: u64,
        rows: u32,
        pairs: u32,
        excluded_pairs: u32,
        element_bytes: u32,
    }
);

params!(
    /// `resolve_params.h`
    FindHitsParams, 40 + 5 * 8, {
        keys: KeyTable,
        candidate_ids: u64,
        indices: u64,
        hits: u64,
        candidates: u64,
        start: u64,
    }
);

params!(
    /// `stream_params.h`
    StreamParams, 21 * 8 + 2 * 8 + 12 * 4, {
        x: u64,
        y: u64,
        x_terms: u64,
        y_terms: u64,
        x_indices: u64,
        y_indices: u64,
        y_addresses: u64,
        hits: u64,
        rows_of_keys: u64,
        positives: u64,
        positive_z: u64,
        pair_offsets: u64,
        bounds: u64,
        max: u64,
        sum: u64,
        masked: u64,
        output: u64,
        sum_score: u64,
        sum_z: u64,
        above: u64,
        ties: u64,
        x_stride: u64,
        y_stride: u64,
        x_rows: u32,
        y_rows: u32,
        dim: u32,
        tiles_per_split: u32,
        first_split: u32,
        candidate_start: u32,
        alignment: u32,
        x_resident: u32,
        online: u32,
        shift: f32,
        rows_capacity: u32,
        pairs: u32,
    }
);

params!(
    /// `bounds_params.h`
    BoundsParams, 12 * 8 + 4 * 4, {
        positive_z: u64,
        positive_offsets: u64,
        queries: u64,
        query_inverse_norm: u64,
        positive_addresses: u64,
        positive_inverse_norm: u64,
        own_z: u64,
        bounds: u64,
        own_bounds: u64,
        query_stride: u64,
        rows: u64,
        filter: f64,
        dim: u32,
        is_ratio: u32,
        scale: f32,
        padding: u32,
    }
);

params!(
    /// `own_params.h`
    OwnNegatives, 7 * 8 + 40 + 2 * 8 + 4 * 4, {
        rows: u64,
        log_q: u64,
        bounds: u64,
        queries: u64,
        query_norms: u64,
        table: u64,
        table_ids: u64,
        keys: KeyTable,
        query_stride: u64,
        table_stride: u64,
        per_row: u32,
        dim: u32,
        cosine: u32,
        scale: f32,
    }
);

params!(
    /// `own_params.h`
    OwnNegativesParams, 128 + 14 * 8, {
        own: OwnNegatives,
        own_z: u64,
        positive_offsets: u64,
        max: u64,
        sum: u64,
        masked: u64,
        output: u64,
        sum_score: u64,
        sum_z: u64,
        above: u64,
        ties: u64,
        fault: u64,
        split: u64,
        queries: u64,
        pairs: u64,
    }
);

params!(
    /// `finish_table_params.h`
    Uses, 4 * 8, { entries: u64, count: u64, first_own: u64, first_pair: u64 }
);

params!(
    /// `finish_table_params.h`
    FinishTableParams, 128 + 4 * 8 + 15 * 8 + 4 * 4, {
        own: OwnNegatives,
        uses: Uses,
        rows: u64,
        max: u64,
        output: u64,
        parts: u64,
        columns: u64,
        pair_rows: u64,
        d_positive: u64,
        coefficients: u64,
        segments: u64,
        places: u64,
        x: u64,
        result: u64,
        x_stride: u64,
        count: u64,
        start: u64,
        splits: u32,
        by_use: u32,
        gamma: f32,
        x_rows: u32,
    }
);

params!(
    /// `check_rows_params.h`
    CheckRowsParams, 5 * 8 + 2 * 4, {
        rows: u64,
        checked: u64,
        fault: u64,
        count: u64,
        limit: u64,
        kind: u32,
        allows_none: u32,
    }
);

params!(
    /// `sort_params.h`
    PlaceRowsParams, 7 * 8, {
        entries: u64,
        counts: u64,
        places: u64,
        rows: u64,
        num_rows: u64,
        count: u64,
        blocks: u64,
    }
);

params!(
    /// `sort_params.h`
    ListUsesParams, 5 * 8, { rows: u64, entries: u64, count: u64, first: u64, limit: u64 }
);

params!(
    /// `sort_params.h`
    SortUsesParams, 4 * 8 + 2 * 4, { from: u64, to: u64, places: u64, count: u64, blocks: u32, shift: u32 }
);

params!(
    /// `topk_params.h`
    TopKParams, size_of::<StreamParams>() + 16, { stream: StreamParams, keys: u64, k: u32, capacity: u32 }
);

params!(
    /// `topk_params.h`
    MergeTopKParams, 3 * 8 + 4 * 4, {
        keys: u64,
        indices: u64,
        scores: u64,
        rows: u32,
        splits: u32,
        k: u32,
        capacity: u32,
    }
);

params!(
    /// `stream_sm90a_params.h`
    #[repr(align(128))]
    HopperParams, 512, {
        x_map: [u64; 16],
        y_map: [u64; 16],
        stream: StreamParams,
        y_row_terms: u64,
        splits: u32,
        padding: u32,
    }
);

params!(
    /// `wide_params.h`
    #[repr(align(128))]
    WideParams, 640, {
        x_map: [u64; 16],
        y_map: [u64; 16],
        stream: StreamParams,
        y_row_terms: u64,
        panel: u64,
        tile_max: u64,
        tile_sum: u64,
        tile_spoiled: u64,
        reference: u64,
        reference_before: u64,
        x_first: u32,
        x_blocks: u32,
        y_first: u32,
        y_tiles: u32,
        units: u32,
        tiles_per_unit: u32,
        adds: u32,
        padding: u32,
    }
);

params!(
    /// `finish_rows_params.h`
    Splits, 4 * 8, { max: u64, sum: u64, masked: u64, count: u64 }
);

params!(
    /// `finish_rows_params.h`
    StatisticsParams, 152, {
        splits: Splits,
        sum_score: u64,
        sum_z: u64,
        above: u64,
        ties: u64,
        positive_z: u64,
        positive_offsets: u64,
        lse: u64,
        positive: u64,
        num_negatives: u64,
        expected_score: u64,
        entropy: u64,
        ranked_above: u64,
        ranked_ties: u64,
        candidates: u64,
        pairs: u64,
    }
);

params!(
    /// `finish_rows_params.h`
    ExpectedParams, 48, { splits: Splits, output: u64, expected_negative: u64 }
);

params!(
    /// `finish_rows_params.h`
    EpilogueParams, 96, {
        block_losses: u64,
        loss: u64,
        probability: u64,
        d_lse: u64,
        d_positive: u64,
        positive_log_q: u64,
        positive_weight: u64,
        row_weight: u64,
        weight_sums: u64,
        weight_blocks: u64,
        fault: u64,
        correction: u32,
        reduction: u32,
    }
);

params!(
    /// `finish_rows_params.h`
    QueryGradientParams, 144, {
        lse: u64,
        num_negatives: u64,
        d_lse: u64,
        d_positive: u64,
        queries: u64,
        query_inverse_norm: u64,
        positive_addresses: u64,
        positive_inverse_norm: u64,
        positive_offsets: u64,
        positives: u64,
        d_queries: u64,
        d_positive_embeddings: u64,
        columns: u64,
        positive_terms: u64,
        block_d_gamma: u64,
        query_stride: u64,
        gamma: f32,
        scale: f32,
        cosine: u32,
        padding: u32,
    }
);

params!(
    /// `finish_rows_params.h`
    FinishRowsParams, 152 + 48 + 96 + 144 + 16, {
        statistics: StatisticsParams,
        expected: ExpectedParams,
        epilogue: EpilogueParams,
        gradient: QueryGradientParams,
        rows: u64,
        dim: u32,
        block_rows: u32,
    }
);

params!(
    /// `finish_gradient_params.h`
    TotalsParams, 7 * 8, {
        block_losses: u64,
        block_d_gamma: u64,
        total: u64,
        d_temperature: u64,
        d_log_temperature: u64,
        blocks: u64,
        gamma: f64,
    }
);

params!(
    /// `finish_gradient_params.h`
    FinishGradientParams, 7 * 8 + 4 * 4 + 56, {
        max: u64,
        output: u64,
        result: u64,
        x: u64,
        inverse_norm: u64,
        x_stride: u64,
        rows: u64,
        dim: u32,
        splits: u32,
        gamma: f32,
        padding: u32,
        totals: TotalsParams,
    }
);

params!(
    /// `symmetric_params.h`
    SymmetricParams, 17 * 8, {
        positives: u64,
        loss: u64,
        swapped_loss: u64,
        probability: u64,
        swapped_probability: u64,
        d_queries: u64,
        swapped_d_candidates: u64,
        d_candidates: u64,
        swapped_d_queries: u64,
        total: u64,
        swapped_total: u64,
        d_temperature: u64,
        swapped_d_temperature: u64,
        d_log_temperature: u64,
        swapped_d_log_temperature: u64,
        rows: u64,
        count: u64,
    }
);

params!(
    /// `accumulate_params.h`
    AccumulateParams, 5 * 8 + 2 * 4, {
        to: u64,
        from: u64,
        rows: u64,
        num_rows: u64,
        count: u64,
        dim: u32,
        is_double: u32,
    }
);

params!(
    /// `enqueue_params.h`
    EnqueueParams, 10 * 8, {
        from: u64,
        to: u64,
        ids: u64,
        to_ids: u64,
        log_q: u64,
        to_log_q: u64,
        rows: u64,
        stride: u64,
        row_bytes: u64,
        unit: u64,
    }
);

/// Values of `EpilogueParams::correction` and `reduction`.
pub(super) const CORRECTION_NONE: u32 = 0;
pub(super) const CORRECTION_LOG_Q: u32 = 1;
pub(super) const CORRECTION_CORRECTED: u32 = 2;
pub(super) const REDUCTION_SUM: u32 = 0;
pub(super) const REDUCTION_MEAN: u32 = 1;
pub(super) const REDUCTION_WEIGHTED_MEAN: u32 = 2;

/// Bytes of what kernels exchange through memory.
pub(super) const ROW_TERM: usize = 8;
pub(super) const COLUMN_TERM: usize = 16;
pub(super) const POSITIVE_TERM: usize = 12;
pub(super) const HITS: usize = 12;
/// `RowsOfKey`.
pub(super) const ROWS_OF_KEY: usize = 16;
