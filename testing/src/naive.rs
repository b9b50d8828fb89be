//! The honest baseline: what a training loop does without this crate, in `f32`. Normalise, matmul, divide by the
//! temperature, subtract log_q, mask, softmax; every B x N array materialised; the backward by the textbook.
//!
//! Tests take its error against float64 as the measure of what `f32` can do; benches take its time.

use catalog_softmax::{Correction, DType, Reduction, Similarity};
use rayon::prelude::*;

use super::problem::{PositiveData, Problem};

/// Results in `f32`, named as in the crate's output. Pools are concatenated.
#[derive(Debug, Clone, Default)]
pub struct Naive {
    pub total: f32,
    pub loss: Vec<f32>,
    pub lse: Vec<f32>,
    pub positive: Vec<f32>,
    pub num_negatives: Vec<u64>,
    pub d_queries: Vec<f32>,
    pub d_candidates: Vec<f32>,
    pub d_positive_embeddings: Vec<f32>,
    pub d_temperature: f32,
}

/// Forward alone, or with the backward. One direction: a symmetric loss is two of these.
pub fn naive(problem: &Problem, backward: bool) -> Naive {
    naive_rounded(problem, backward, DType::F32)
}

/// The same as mixed precision does it: operands of matmuls (unit vectors, coefficients) rounded to `operands`.
pub fn naive_rounded(problem: &Problem, backward: bool, operands: DType) -> Naive {
    let (b, n, d) = (problem.num_queries(), problem.num_candidates(), problem.dim);
    let loss = &problem.loss;
    let tau = loss.temperature as f32;
    let queries = problem.queries.to_f32();
    let candidates: Vec<f32> = problem.pools.iter().flat_map(|pool| pool.candidates.to_f32()).collect();
    let (mut q, q_inverse) = units(&queries, d, loss.similarity);
    let (mut c, c_inverse) = units(&candidates, d, loss.similarity);
    round(&mut q, operands);
    round(&mut c, operands);
    let (mut p, p_inverse) = match &problem.positives {
        PositiveData::Separate(embeddings) => units(&embeddings.to_f32(), d, loss.similarity),
        PositiveData::Index(index) => {
            let rows = index.iter().flat_map(|&j| &c[j as usize * d..(j as usize + 1) * d]).copied().collect();
            (rows, Vec::new())
        }
    };

    round(&mut p, operands);
    let mut z = matmul_transposed(&q, &c, b, n, d);
    z.par_iter_mut().for_each(|z| *z /= tau);
    if problem.pools[0].log_q.is_some() {
        let log_q: Vec<f32> = problem.pools.iter().flat_map(|pool| pool.log_q.clone().unwrap_or_default()).collect();
        z.par_chunks_mut(n).for_each(|row| row.iter_mut().zip(&log_q).for_each(|(z, log_q)| *z -= log_q));
    }
    let num_negatives = mask(problem, &mut z, n, f32::NEG_INFINITY);

    let mut out = Naive { num_negatives, ..Naive::default() };
    out.positive = (0..b).map(|i| dot(&q[i * d..(i + 1) * d], &p[i * d..(i + 1) * d]) / tau).collect();
    out.lse = z.par_chunks(n).map(log_sum_exp).collect();
    let coefficient = epilogue(problem, &mut out);
    if !backward {
        return out;
    }

    // Softmax over the negatives times each row's coefficient: the gradient of the logits.
    z.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
        let (lse, a) = (out.lse[i], coefficient[i]);
        row.iter_mut().for_each(|z| *z = if a == 0.0 { 0.0 } else { a * (*z - lse).exp() / tau });
    });
    round(&mut z, operands);
    let mut d_q = matmul(&z, &c, b, d, n);
    let mut d_p = vec![0.0f32; b * d];
    let mut d_tau = 0.0f32;
    for i in 0..b {
        let (q, p) = (&q[i * d..(i + 1) * d], &p[i * d..(i + 1) * d]);
        let a = coefficient[i] / tau;
        let negative = dot(&d_q[i * d..(i + 1) * d], q);
        d_tau -= (negative - a * dot(q, p)) / tau;
        for k in 0..d {
            d_q[i * d + k] -= a * p[k];
            d_p[i * d + k] = -a * q[k];
        }
    }
    if let PositiveData::Index(index) = &problem.positives {
        for (i, &j) in index.iter().enumerate() {
            z[i * n + j as usize] -= coefficient[i] / tau;
        }
    }
    let mut d_c = transposed_matmul(&z, &q, n, d, b);
    chain_rule(&mut d_q, &q, &q_inverse, d);
    chain_rule(&mut d_c, &c, &c_inverse, d);
    if matches!(problem.positives, PositiveData::Separate(_)) {
        chain_rule(&mut d_p, &p, &p_inverse, d);
        out.d_positive_embeddings = d_p;
    }
    (out.d_queries, out.d_candidates, out.d_temperature) = (d_q, d_c, d_tau);
    out
}

/// Losses and total; returns each row's coefficient, weight and reduction folded in.
fn epilogue(problem: &Problem, out: &mut Naive) -> Vec<f32> {
    let b = problem.num_queries();
    let weight = |i: usize| problem.row_weight.as_ref().map_or(1.0, |w| w[i]);
    let upstream = match problem.loss.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::Mean => 1.0 / b as f32,
        Reduction::WeightedMean => 1.0 / (0..b).map(weight).sum::<f32>(),
        other => panic!("no formula for {other:?}"),
    };
    let log_q: Vec<f32> = problem.pools.iter().flat_map(|pool| pool.log_q.clone().unwrap_or_default()).collect();
    let positive_log_q = |i: usize| match &problem.positives {
        PositiveData::Index(index) => log_q[index[i] as usize],
        PositiveData::Separate(_) => problem.positive_log_q.as_ref().map_or(f32::NAN, |log_q| log_q[i]),
    };
    let mut coefficients = Vec::new();
    for i in 0..b {
        let (loss, a) = if out.num_negatives[i] == 0 {
            (0.0, 0.0)
        } else {
            let shift = match problem.loss.correction {
                Correction::None | Correction::LogQNegativesOnly => 0.0,
                Correction::LogQ => positive_log_q(i),
                Correction::CorrectedLogQ => (-positive_log_q(i).exp()).ln_1p(),
                other => panic!("no formula for {other:?}"),
            };
            let m = out.lse[i] + shift - out.positive[i];
            if problem.loss.correction == Correction::CorrectedLogQ {
                let w = 1.0 / (1.0 + ((out.num_negatives[i] as f32).ln() - m).exp());
                (w * m, w)
            } else {
                (m.max(0.0) + (-m.abs()).exp().ln_1p(), 1.0 / (1.0 + (-m).exp()))
            }
        };
        out.loss.push(loss);
        out.total += weight(i) * upstream * loss;
        coefficients.push(weight(i) * upstream * a);
    }
    coefficients
}

/// Rounds to the significand of an element type. Its range is left aside: mixed precision scales what would leave it.
fn round(values: &mut [f32], to: DType) {
    let dropped = match to {
        DType::F16 => 23 - 10,
        DType::Bf16 => 23 - 7,
        _ => return,
    };
    let half = 1u32 << (dropped - 1);
    values.par_iter_mut().for_each(|v| *v = f32::from_bits(v.to_bits().wrapping_add(half) & !(2 * half - 1)));
}

/// Sets what is no negative to `masked`; returns how many are left in each row.
pub fn mask<T: Copy + Send + Sync>(problem: &Problem, z: &mut [T], n: usize, masked: T) -> Vec<u64> {
    let ids = problem.pools.iter().map(|pool| pool.ids.clone()).collect::<Option<Vec<_>>>();
    let ids: Option<Vec<u64>> = ids.map(|ids| ids.concat());
    let row_mask = |(i, row): (usize, &mut [T])| {
        let mut negatives = n as u64;
        let index = match &problem.positives {
            PositiveData::Index(index) => Some(index[i] as usize),
            PositiveData::Separate(_) => None,
        };
        let positive_id = match (&problem.positive_ids, index, &ids) {
            (Some(positive_ids), _, _) => Some(positive_ids[i]),
            (None, Some(index), Some(ids)) => Some(ids[index]),
            _ => None,
        };
        let excluded = problem
            .excluded
            .as_ref()
            .map_or(&[][..], |(offsets, ids)| &ids[offsets[i] as usize..offsets[i + 1] as usize]);
        for (j, z) in row.iter_mut().enumerate() {
            let id = ids.as_ref().map(|ids| ids[j]);
            let hit = id.is_some() && (id == positive_id || id.is_some_and(|id| excluded.contains(&id)));
            if hit || Some(j) == index {
                *z = masked;
                negatives -= 1;
            }
        }
        negatives
    };
    z.par_chunks_mut(n).enumerate().map(row_mask).collect()
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, &z| max.max(z));
    if max == f32::NEG_INFINITY { max } else { max + row.iter().map(|z| (z - max).exp()).sum::<f32>().ln() }
}

fn units(x: &[f32], d: usize, similarity: Similarity) -> (Vec<f32>, Vec<f32>) {
    let rows = x.len() / d;
    if similarity == Similarity::Dot {
        return (x.to_vec(), vec![f32::NAN; rows]);
    }
    let inverse: Vec<f32> = x
        .par_chunks(d)
        .map(|row| {
            let norm = dot(row, row).sqrt();
            if norm < 1e-12 { 0.0 } else { 1.0 / norm }
        })
        .collect();
    let mut unit = x.to_vec();
    unit.par_chunks_mut(d).zip(&inverse).for_each(|(row, inverse)| row.iter_mut().for_each(|x| *x *= inverse));
    (unit, inverse)
}

/// NaN inverses stand for `Dot`, which has no chain rule.
fn chain_rule(d_unit: &mut [f32], unit: &[f32], inverse: &[f32], d: usize) {
    if inverse.first().is_none_or(|inverse| inverse.is_nan()) {
        return;
    }
    d_unit.par_chunks_mut(d).zip(unit.par_chunks(d)).zip(inverse).for_each(|((d_unit, unit), inverse)| {
        let along = dot(d_unit, unit);
        d_unit.iter_mut().zip(unit).for_each(|(d, unit)| *d = (*d - unit * along) * inverse);
    });
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `a (m, k) · b (n, k)ᵀ`
fn matmul_transposed(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    product(a, [k, 1], b, [1, k], m, n, k)
}

/// `a (m, k) · b (k, n)`
fn matmul(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    product(a, [k, 1], b, [n, 1], m, n, k)
}

/// `a (k, m)ᵀ · b (k, n)`
fn transposed_matmul(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    product(a, [1, m], b, [n, 1], m, n, k)
}

/// Floating-point operations a second of a matmul library, `gemm`, on tiles of 256 x 256 scores with a sum over `dim`, on as many
/// threads at once: what a CPU does on matmuls whose operands are in its caches.
pub fn matmul_rate(dim: usize, threads: usize) -> f64 {
    const TILE: usize = 256;
    const REPETITIONS: usize = 40;
    let one_thread = || {
        let (a, b) = (vec![0.5f32; TILE * dim], vec![0.25f32; TILE * dim]);
        let mut to = vec![0.0f32; TILE * TILE];
        let mut round = || {
            let start = std::time::Instant::now();
            (0..REPETITIONS).for_each(|_| multiply(&a, [dim, 1], &b, [1, dim], &mut to, [TILE, TILE, dim]));
            start.elapsed().as_secs_f64()
        };
        // The first round brings everything into the caches.
        round();
        (2 * TILE * TILE * dim * REPETITIONS) as f64 / round().min(round())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(one_thread)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    })
}

/// Strides are of rows and columns; the product is row-major. Rows of the product are computed in parallel.
fn product(
    a: &[f32],
    a_strides: [usize; 2],
    b: &[f32],
    b_strides: [usize; 2],
    m: usize,
    n: usize,
    k: usize,
) -> Vec<f32> {
    let mut to = vec![0.0f32; m * n];
    let block = m.div_ceil(rayon::current_num_threads()).max(1);
    to.par_chunks_mut(block * n).enumerate().for_each(|(i, to)| {
        let rows = to.len() / n;
        multiply(&a[i * block * a_strides[0]..], a_strides, b, b_strides, to, [rows, n, k]);
    });
    to
}

/// `to (m, n) = a (m, k) · b (k, n)`, `to` row-major, on this thread.
fn multiply(a: &[f32], a_strides: [usize; 2], b: &[f32], b_strides: [usize; 2], to: &mut [f32], [m, n, k]: [usize; 3]) {
    assert!(a.len() > (m - 1) * a_strides[0] + (k - 1) * a_strides[1] && b.len() == k * n && to.len() == m * n);
    // SAFETY: the assertion above bounds what the strides reach, and `to` is borrowed mutably.
    unsafe {
        // The library prefers contiguous columns, so the product is handed over transposed.
        gemm_f32::gemm::f32::get_gemm_fn()(
            n,
            m,
            k,
            to.as_mut_ptr(),
            n as isize,
            1,
            false,
            b.as_ptr(),
            b_strides[0] as isize,
            b_strides[1] as isize,
            a.as_ptr(),
            a_strides[0] as isize,
            a_strides[1] as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}
