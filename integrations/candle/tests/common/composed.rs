//! The loss as one writes it from candle's operators, with the B x N scores in memory.

use candle_core::{D, Device, Result, Tensor};
use catalog_softmax_candle::{Correction, Reduction, Similarity};

use super::{Problem, Variables, vector};

/// In the type of the variables.
pub fn loss(problem: &Problem, variables: &Variables) -> Result<Tensor> {
    let Variables { queries, candidates, positive_embeddings, temperature } = variables;
    let positives = positive_embeddings.as_ref().map(|var| var.as_tensor());
    let forward = direction(problem, queries, candidates, positives, temperature)?;
    if !problem.symmetric {
        return Ok(forward);
    }
    // Candidate positives[i] is row i of the other direction's candidate i.
    let order: Vec<u32> =
        if problem.positives.is_empty() { (0..problem.b() as u32).collect() } else { problem.positives.clone() };
    let in_order = candidates.index_select(&vector(&order)?, 0)?;
    let mut swapped = Problem { symmetric: false, positives: Vec::new(), ..problem.clone() };
    if !problem.candidate_ids.is_empty() {
        swapped.candidate_ids = order.iter().map(|&j| problem.candidate_ids[j as usize]).collect();
    }
    let back = direction(&swapped, &in_order, queries, None, temperature)?;
    (forward + back)? * 0.5
}

fn direction(
    problem: &Problem,
    queries: &Tensor,
    candidates: &Tensor,
    positives: Option<&Tensor>,
    temperature: &Tensor,
) -> Result<Tensor> {
    let dtype = queries.dtype();
    let of_type = |values: &[f32]| vector(values)?.to_dtype(dtype);
    let unit = |x: &Tensor| match problem.similarity {
        Similarity::Cosine => x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?),
        _ => Ok(x.clone()),
    };
    let (queries, candidates) = (unit(queries)?, unit(candidates)?);
    let pairs = Pairs::new(problem);
    let positives = match positives {
        Some(positives) => unit(positives)?,
        None => candidates.index_select(&vector(&pairs.positives)?, 0)?,
    };
    let mut scores = queries.matmul(&candidates.t()?)?.broadcast_div(temperature)?;
    if !problem.log_q.is_empty() {
        scores = scores.broadcast_sub(&of_type(&problem.log_q)?)?;
    }
    let masked = pairs.masked(problem);
    let negatives: Vec<f32> =
        masked.chunks(problem.n()).map(|row| row.iter().filter(|m| **m == 0.0).count() as f32).collect();
    let scores = (scores + Tensor::from_vec(masked, (problem.b(), problem.n()), &Device::Cpu)?.to_dtype(dtype)?)?;
    let max = scores.max_keepdim(1)?.detach();
    let lse = (scores.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max)?.squeeze(1)?;

    let rows = vector(&pairs.rows)?;
    let positive = (queries.index_select(&rows, 0)? * positives)?.sum(1)?.broadcast_div(temperature)?;
    let mut margin = (lse.index_select(&rows, 0)? - positive)?;
    let log_q = of_type(&pairs.log_q)?;
    match problem.correction {
        Correction::LogQ => margin = (margin + log_q)?,
        Correction::CorrectedLogQ => margin = (margin + (1.0 - log_q.exp()?)?.log()?)?,
        _ => {}
    }
    let losses = match problem.correction {
        Correction::CorrectedLogQ => {
            let count = of_type(&negatives)?.index_select(&rows, 0)?;
            let weight = ((margin.detach() - count.log()?)?.neg()?.exp()? + 1.0)?.recip()?;
            (weight * margin)?
        }
        _ => (margin.relu()? + (margin.abs()?.neg()?.exp()? + 1.0)?.log()?)?,
    };
    let losses = Tensor::zeros(problem.b(), dtype, &Device::Cpu)?.index_add(
        &rows,
        &(losses * vector(&pairs.weights)?.to_dtype(dtype)?)?,
        0,
    )?;
    let weights = if problem.row_weight.is_empty() { vec![1.0; problem.b()] } else { problem.row_weight.clone() };
    let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    let weighted = (losses * of_type(&weights)?)?;
    match problem.reduction {
        Reduction::None => Ok(weighted),
        Reduction::Sum => weighted.sum_all(),
        Reduction::WeightedMean => weighted.sum_all()? / total,
        _ => weighted.sum_all()? / problem.b() as f64,
    }
}

/// Rows with their positives.
struct Pairs {
    rows: Vec<u32>,
    /// Indices of candidates, where positives are among them.
    positives: Vec<u32>,
    weights: Vec<f64>,
    log_q: Vec<f32>,
    ids: Vec<u32>,
}

impl Pairs {
    fn new(problem: &Problem) -> Self {
        let b = problem.b();
        let one_each: Vec<i64> = (0..=b as i64).collect();
        let offsets = if problem.positive_offsets.is_empty() { &one_each } else { &problem.positive_offsets };
        let of_rows = || offsets.windows(2).enumerate().flat_map(|(row, ends)| (ends[0]..ends[1]).map(move |_| row));
        let share = |row: usize| 1.0 / (offsets[row + 1] - offsets[row]) as f64;
        let separate = !problem.positive_embeddings.is_empty();
        let positives = match (separate, problem.positives.is_empty()) {
            (true, _) => Vec::new(),
            (false, true) => (0..b as u32).collect(),
            (false, false) => problem.positives.clone(),
        };
        let gathered = |of: &[f32]| positives.iter().map(|&j| of[j as usize]).collect();
        Pairs {
            rows: of_rows().map(|row| row as u32).collect(),
            weights: if problem.positive_weight.is_empty() {
                of_rows().map(share).collect()
            } else {
                problem.positive_weight.iter().map(|&w| f64::from(w)).collect()
            },
            log_q: match (separate, problem.log_q.is_empty()) {
                (true, _) => problem.positive_log_q.clone(),
                (false, true) => Vec::new(),
                (false, false) => gathered(&problem.log_q),
            },
            ids: match (separate, problem.candidate_ids.is_empty()) {
                (true, _) => problem.positive_ids.clone(),
                (false, true) => Vec::new(),
                (false, false) => positives.iter().map(|&j| problem.candidate_ids[j as usize]).collect(),
            },
            positives,
        }
    }

    /// (B, N): −∞ where a candidate is no negative of the row, else 0.
    fn masked(&self, problem: &Problem) -> Vec<f32> {
        let n = problem.n();
        let mut masked = vec![0f32; problem.b() * n];
        for (pair, &row) in self.rows.iter().enumerate() {
            for j in 0..n {
                let by_index = self.positives.get(pair).is_some_and(|&positive| positive as usize == j);
                let by_id = self.ids.get(pair).is_some_and(|id| problem.candidate_ids.get(j) == Some(id));
                if by_index || by_id {
                    masked[row as usize * n + j] = f32::NEG_INFINITY;
                }
            }
        }
        if let Some((offsets, ids)) = &problem.excluded {
            for (row, ends) in offsets.windows(2).enumerate() {
                let excluded = &ids[ends[0] as usize..ends[1] as usize];
                for (j, _) in problem.candidate_ids.iter().enumerate().filter(|(_, id)| excluded.contains(id)) {
                    masked[row * n + j] = f32::NEG_INFINITY;
                }
            }
        }
        masked
    }
}
