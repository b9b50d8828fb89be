//! Row statistics as the bytes that ranks send each other: B numbers for each field, little-endian, 8 bytes each.

use crate::problem::statistics::{Moments, Rank, Request, RowStatistics};

/// lse, num_negatives and the optional fields; the positives' scores where `positive` says so. They are the same on all
/// ranks, so one sends them.
pub(super) fn encode<T>(statistics: &RowStatistics<T>, positive: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut doubles = |values: &[f64]| bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    doubles(&statistics.lse);
    if let Some(moments) = &statistics.moments {
        doubles(&moments.expected_score);
        doubles(&moments.entropy);
    }
    if positive {
        doubles(&statistics.positive);
    }
    let mut counts = |values: &[u64]| bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    counts(&statistics.num_negatives);
    if let Some(rank) = &statistics.rank {
        counts(&rank.above);
        counts(&rank.ties);
    }
    bytes
}

/// The statistics of `rows` rows and `pairs` positives, after a step that all ranks agreed on.
pub(super) fn decode<T>(
    bytes: &[u8],
    request: Request,
    rows: usize,
    pairs: usize,
    positive: Option<&[f64]>,
) -> RowStatistics<T> {
    let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
    let mut take = |len: usize| words.by_ref().take(len).collect::<Vec<u64>>();
    let doubles = |words: Vec<u64>| words.into_iter().map(f64::from_bits).collect::<Vec<f64>>();
    let lse = doubles(take(rows));
    let moments =
        request.moments.then(|| Moments { expected_score: doubles(take(rows)), entropy: doubles(take(rows)) });
    let positive = positive.map_or_else(|| doubles(take(pairs)), <[f64]>::to_vec);
    let num_negatives = take(rows);
    let rank = request.rank.then(|| Rank { above: take(pairs), ties: take(pairs) });
    RowStatistics { lse, positive, num_negatives, moments, rank, expected_negative: None }
}
