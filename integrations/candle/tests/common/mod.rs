//! Problems, and the same loss computed in two other ways: by the core's float64 reference, and composed of candle's
//! own operators, in f32 (the baseline that sets tolerances) or in f64.

#![allow(dead_code)]

pub mod composed;

use candle_core::{DType, Device, Result, Tensor, Var};
use catalog_softmax_candle::catalog_softmax::half::{bf16, f16};
use catalog_softmax_candle::catalog_softmax::{
    Backend, Batch, Elements, Embeddings, Gradients, Loss, Output, Pool, Reference, Request,
};
use catalog_softmax_candle::{Correction, Options, Reduction, Similarity};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A problem on the host. Empty vectors are not given.
#[derive(Clone)]
pub struct Problem {
    pub name: &'static str,
    pub dim: usize,
    pub similarity: Similarity,
    pub temperature: f64,
    pub correction: Correction,
    pub reduction: Reduction,
    pub symmetric: bool,
    pub queries: Vec<f32>,
    pub candidates: Vec<f32>,
    pub positive_embeddings: Vec<f32>,
    pub positives: Vec<u32>,
    pub positive_offsets: Vec<i64>,
    pub positive_weight: Vec<f32>,
    pub positive_ids: Vec<u32>,
    pub positive_log_q: Vec<f32>,
    pub candidate_ids: Vec<u32>,
    pub log_q: Vec<f32>,
    pub excluded: Option<(Vec<i64>, Vec<u32>)>,
    pub row_weight: Vec<f32>,
    pub margin: Option<f64>,
}

const DIM: usize = 24;

pub fn random(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

pub fn numbers(rng: &mut StdRng, count: usize, low: f32, high: f32) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(low..high)).collect()
}

impl Problem {
    /// `b` queries against `n` candidates, in-batch, without any option. Values are those that f16 and bf16 have, too.
    pub fn new(name: &'static str, seed: u64, b: usize, n: usize) -> Self {
        let mut rng = random(seed);
        let mut matrix = |rows: usize| {
            let values = numbers(&mut rng, rows * DIM, -1.0, 1.0);
            values.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
        };
        Problem {
            name,
            dim: DIM,
            similarity: Similarity::Cosine,
            temperature: 0.2,
            correction: Correction::None,
            reduction: Reduction::Mean,
            symmetric: false,
            queries: matrix(b),
            candidates: matrix(n),
            positive_embeddings: Vec::new(),
            positives: Vec::new(),
            positive_offsets: Vec::new(),
            positive_weight: Vec::new(),
            positive_ids: Vec::new(),
            positive_log_q: Vec::new(),
            candidate_ids: Vec::new(),
            log_q: Vec::new(),
            excluded: None,
            row_weight: Vec::new(),
            margin: None,
        }
    }

    pub fn b(&self) -> usize {
        self.queries.len() / self.dim
    }

    pub fn n(&self) -> usize {
        self.candidates.len() / self.dim
    }

    pub fn options(&self) -> Result<Options> {
        let excluded =
            self.excluded.as_ref().map(|(offsets, ids)| -> Result<_> { Ok((vector(offsets)?, vector(ids)?)) });
        Ok(Options {
            similarity: self.similarity,
            temperature: self.temperature.into(),
            correction: self.correction,
            reduction: self.reduction,
            symmetric: self.symmetric,
            positives: given(&self.positives)?,
            positive_ids: given(&self.positive_ids)?,
            positive_log_q: given(&self.positive_log_q)?,
            positive_offsets: given(&self.positive_offsets)?,
            positive_weight: given(&self.positive_weight)?,
            candidate_ids: given(&self.candidate_ids)?,
            log_q: given(&self.log_q)?,
            excluded: excluded.transpose()?,
            row_weight: given(&self.row_weight)?,
            false_negative_margin: self.margin,
            ..Options::default()
        })
    }
}

pub fn vector<T: candle_core::WithDType>(values: &[T]) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), &Device::Cpu)
}

fn given<T: candle_core::WithDType>(values: &[T]) -> Result<Option<Tensor>> {
    if values.is_empty() { Ok(None) } else { vector(values).map(Some) }
}

/// The variables of a problem.
pub struct Variables {
    pub queries: Var,
    pub candidates: Var,
    pub positive_embeddings: Option<Var>,
    pub temperature: Var,
}

impl Variables {
    pub fn new(problem: &Problem, dtype: DType, temperature: DType) -> Result<Self> {
        let matrix = |values: &[f32]| {
            let shape = (values.len() / problem.dim, problem.dim);
            Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
        };
        let positives = &problem.positive_embeddings;
        Ok(Variables {
            queries: matrix(&problem.queries)?,
            candidates: matrix(&problem.candidates)?,
            positive_embeddings: (!positives.is_empty()).then(|| matrix(positives)).transpose()?,
            temperature: Var::from_tensor(&Tensor::new(problem.temperature, &Device::Cpu)?.to_dtype(temperature)?)?,
        })
    }
}

/// A loss with its gradients, flat: queries, candidates, positive embeddings, temperature.
#[derive(Debug)]
pub struct Step {
    pub loss: Vec<f64>,
    pub gradients: [Vec<f64>; 4],
}

pub const PARTS: [&str; 5] = ["loss", "queries", "candidates", "positive_embeddings", "temperature"];

impl Step {
    /// Of a loss in candle, with `upstream` as the derivative by each row where there are several.
    pub fn of(loss: &Tensor, variables: &Variables, upstream: &[f32]) -> Result<Self> {
        let total = if loss.rank() == 0 {
            loss.clone()
        } else {
            (loss * vector(upstream)?.to_dtype(loss.dtype())?)?.sum_all()?
        };
        let gradients = total.backward()?;
        let flat = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let of = |var: &Var| {
            let gradient = gradients.get(var).expect("a gradient of every variable");
            assert_eq!((gradient.dtype(), gradient.shape()), (var.dtype(), var.shape()));
            flat(gradient)
        };
        let Variables { queries, candidates, positive_embeddings, temperature } = variables;
        let positives = positive_embeddings.as_ref().map(of).transpose()?.unwrap_or_default();
        Ok(Step { loss: flat(loss)?, gradients: [of(queries)?, of(candidates)?, positives, of(temperature)?] })
    }

    pub fn parts(&self) -> [&[f64]; 5] {
        let [queries, candidates, positives, temperature] = &self.gradients;
        [&self.loss, queries, candidates, positives, temperature]
    }
}

/// The same by the float64 reference, on embeddings rounded to `dtype`.
pub fn reference(problem: &Problem, dtype: DType, upstream: &[f32]) -> Step {
    let rounded = |values: &[f32]| Rounded::new(values, dtype);
    let (queries, candidates) = (rounded(&problem.queries), rounded(&problem.candidates));
    let positives = rounded(&problem.positive_embeddings);
    let (b, n, dim) = (problem.b(), problem.n(), problem.dim);
    let mut pool = Pool::new(Embeddings::new(candidates.elements(), n, dim));
    if !problem.candidate_ids.is_empty() {
        pool = pool.ids(&problem.candidate_ids);
    }
    if !problem.log_q.is_empty() {
        pool = pool.log_q(&problem.log_q);
    }
    let rows = Embeddings::new(queries.elements(), b, dim);
    let separate = problem.positive_embeddings.len() / dim;
    let mut batch = match (problem.positives.is_empty(), separate) {
        (true, 0) => Batch::in_batch(rows, pool),
        (true, p) => Batch::builder(rows, pool).positive_embeddings(Embeddings::new(positives.elements(), p, dim)),
        (false, _) => Batch::builder(rows, pool).positives(&problem.positives),
    };
    if !problem.positive_ids.is_empty() {
        batch = batch.positive_ids(&problem.positive_ids);
    }
    if !problem.positive_log_q.is_empty() {
        batch = batch.positive_log_q(&problem.positive_log_q);
    }
    if !problem.positive_offsets.is_empty() {
        batch = batch.positive_offsets(&problem.positive_offsets);
    }
    if !problem.positive_weight.is_empty() {
        batch = batch.positive_weight(&problem.positive_weight);
    }
    if let Some((offsets, ids)) = &problem.excluded {
        batch = batch.excluded_ids(offsets, ids);
    }
    // Without a reduction, an upstream derivative of a row is a weight of the row.
    let per_row = problem.reduction == Reduction::None;
    let own = |row: usize| problem.row_weight.get(row).copied().unwrap_or(1.0);
    let weights: Vec<f32> = (0..b).map(|row| if per_row { own(row) * upstream[row] } else { own(row) }).collect();
    if per_row || !problem.row_weight.is_empty() {
        batch = batch.row_weight(&weights);
    }
    let batch = batch.build().expect("a problem that keeps the rules");
    let mut loss = Loss::softmax(problem.similarity, problem.temperature);
    loss = loss.correction(problem.correction).reduction(problem.reduction);
    if problem.symmetric {
        loss = loss.symmetric();
    }
    if let Some(margin) = problem.margin {
        loss = loss.false_negative_margin(margin);
    }
    let (mut output, mut gradients) = (Output::default(), Gradients::default());
    Reference::new()
        .compute(&batch, &loss, Request::value_and_grad(), &mut output, Some(&mut gradients))
        .expect("a loss that fits the problem");
    let d_positives = gradients.d_positive_embeddings.map(|d| d.values).unwrap_or_default();
    let rows = output.loss.iter().enumerate().map(|(row, loss)| f64::from(own(row)) * loss);
    Step {
        loss: if per_row { rows.collect() } else { vec![output.total] },
        gradients: [
            gradients.d_queries.values,
            gradients.d_candidates.remove(0).values,
            d_positives,
            vec![gradients.d_temperature],
        ],
    }
}

/// Numbers of a type.
enum Rounded {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Rounded {
    fn new(values: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::F16 => Rounded::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::BF16 => Rounded::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => Rounded::F32(values.to_vec()),
        }
    }

    fn elements(&self) -> Elements<'_> {
        match self {
            Rounded::F32(values) => values.into(),
            Rounded::F16(values) => values.into(),
            Rounded::Bf16(values) => values.into(),
        }
    }
}
