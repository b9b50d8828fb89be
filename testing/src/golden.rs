//! Golden batches: one training step in a safetensors file, inputs and options and, where known, the right results.
//! `docs/replay.md` describes the file.
//!
//! A file is input from outside: whatever is wrong with it is a [`LoadError`], never a panic.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use catalog_softmax::{Correction, Loss, Reduction, RowNegatives, Similarity};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use super::problem::{PoolData, PoolRows, PositiveData, Problem, RowNegativesData, Storage, TableData};

/// Names of the results, in the order in which they are shown.
pub const RESULTS: [&str; 10] = [
    "loss",
    "total",
    "lse",
    "positive",
    "num_negatives",
    "d_queries",
    "d_candidates",
    "d_positive_embeddings",
    "d_table",
    "d_temperature",
];

const INPUTS: [&str; 17] = [
    "queries",
    "candidates",
    "table",
    "candidate_rows",
    "row_negatives",
    "row_negatives_log_q",
    "positives",
    "positive_offsets",
    "positive_weight",
    "positive_embeddings",
    "candidate_ids",
    "positive_ids",
    "log_q",
    "positive_log_q",
    "exclude_offsets",
    "exclude_ids",
    "row_weight",
];

/// `format` is what the Python package writes beside the user's own metadata.
const METADATA: [&str; 10] = [
    "similarity",
    "temperature",
    "loss",
    "correct_positive",
    "reduction",
    "symmetric",
    "false_negative_margin",
    "false_negative_ratio",
    "note",
    "format",
];

/// A step's inputs and what is known of its results.
pub struct Golden {
    pub problem: Problem,
    pub expected: Expected,
}

/// Results by name; those that the file does not hold are absent.
pub type Expected = BTreeMap<&'static str, Tensor>;

/// A tensor of numbers, widened to `f64`. Results and expectations alike.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub values: Vec<f64>,
    pub shape: Vec<usize>,
    /// The type in which it is stored: `F64`, `F32` or `I64`.
    pub dtype: Dtype,
}

/// What can be wrong with a golden batch's file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("no valid safetensors file: {0}")]
    Format(#[from] SafeTensorError),
    #[error("tensor {name} is missing; rule: {rule}")]
    MissingTensor { name: String, rule: &'static str },
    #[error("tensor {name} has {found}; rule: {rule}")]
    Tensor { name: String, found: String, rule: String },
    #[error("metadata {key} is {found}; rule: {rule}")]
    Metadata { key: String, found: String, rule: String },
}

type Result<T> = std::result::Result<T, LoadError>;

impl Golden {
    pub fn load(path: &Path) -> Result<Golden> {
        Golden::from_bytes(&std::fs::read(path)?)
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Golden> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let file = File { tensors: SafeTensors::deserialize(bytes)? };
        file.check_names()?;
        let no_options = HashMap::new();
        let loss = Options(header.metadata().as_ref().unwrap_or(&no_options))
            .loss(file.has("log_q") || file.has("row_negatives_log_q"))?;
        let problem = file.problem(loss)?;
        let expected = file.expected(&problem)?;
        Ok(Golden { problem, expected })
    }
}

struct File<'a> {
    tensors: SafeTensors<'a>,
}

impl<'a> File<'a> {
    fn has(&self, name: &str) -> bool {
        self.tensors.names().contains(&name)
    }

    /// A misspelt tensor would otherwise be an option silently not taken.
    fn check_names(&self) -> Result<()> {
        let known = |name: &str| match name.strip_prefix("expected.") {
            Some(result) => RESULTS.contains(&result),
            None => INPUTS.contains(&name),
        };
        match self.tensors.names().into_iter().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => Err(tensor_error(name, "a name that means nothing here", format!("one of {INPUTS:?}"))),
        }
    }

    fn problem(&self, loss: Loss) -> Result<Problem> {
        let (queries, dim) = self.matrix("queries")?;
        let excluded = match (self.vector("exclude_offsets", Dtype::I64)?, self.ids("exclude_ids")?) {
            (Some(offsets), Some(ids)) => Some((offsets, ids)),
            (None, None) => None,
            _ => return Err(missing("exclude_offsets or exclude_ids", "the two come together")),
        };
        Ok(Problem {
            dim,
            queries,
            table: self.table(dim)?,
            pools: self.pools(dim)?,
            row_negatives: self.row_negatives()?,
            positives: self.positives(dim)?,
            positive_offsets: self.vector("positive_offsets", Dtype::I64)?,
            positive_weight: self.vector("positive_weight", Dtype::F32)?,
            positive_ids: self.ids("positive_ids")?,
            positive_log_q: self.vector("positive_log_q", Dtype::F32)?,
            excluded,
            row_weight: self.vector("row_weight", Dtype::F32)?,
            loss,
        })
    }

    fn table(&self, dim: usize) -> Result<Option<TableData>> {
        if !self.has("table") {
            return match ["candidate_rows", "row_negatives"].into_iter().find(|name| self.has(name)) {
                None => Ok(None),
                Some(_) => Err(missing("table", "candidate_rows and row_negatives are rows of it")),
            };
        }
        for name in ["candidates", "candidate_ids"] {
            if self.has(name) {
                let rule = "a batch has candidates, or a table whose rows are its items";
                return Err(tensor_error(name, "a table beside it", rule.into()));
            }
        }
        Ok(Some(TableData::new(self.matrix_of("table", dim)?)))
    }

    /// One pool: of embeddings, of rows of the table, or the whole table; none beside row_negatives alone.
    fn pools(&self, dim: usize) -> Result<Vec<PoolData>> {
        let rows = self.rows("candidate_rows", "a row of the table: 0 <= row < 2^32")?;
        let (candidates, rows) = match (self.has("table"), rows, self.has("row_negatives")) {
            (false, ..) => (self.matrix_of("candidates", dim)?, None),
            (true, Some(rows), _) => (Storage::F32(Vec::new()), Some(PoolRows::These(rows))),
            (true, None, false) => (Storage::F32(Vec::new()), Some(PoolRows::All)),
            (true, None, true) if self.has("log_q") => {
                return Err(tensor_error("log_q", "no pool", "row_negatives have row_negatives_log_q".into()));
            }
            (true, None, true) => return Ok(Vec::new()),
        };
        let (ids, log_q) = (self.ids("candidate_ids")?, self.vector("log_q", Dtype::F32)?);
        Ok(vec![PoolData { candidates, rows, ids, log_q, gradient: true }])
    }

    fn row_negatives(&self) -> Result<Option<RowNegativesData>> {
        let Ok(view) = self.tensors.tensor("row_negatives") else {
            return match self.has("row_negatives_log_q") {
                true => Err(missing("row_negatives", "row_negatives_log_q belongs to them")),
                false => Ok(None),
            };
        };
        let (&[_, per_row], Dtype::I64) = (view.shape(), view.dtype()) else {
            let found = format!("type {:?} and shape {:?}", view.dtype(), view.shape());
            return Err(tensor_error("row_negatives", found, "type I64 and two axes".into()));
        };
        let log_q = match self.tensors.tensor("row_negatives_log_q") {
            Err(_) => None,
            Ok(log_q) if log_q.shape() == view.shape() && log_q.dtype() == Dtype::F32 => Some(elements(log_q.data())),
            Ok(log_q) => {
                let found = format!("type {:?} and shape {:?}", log_q.dtype(), log_q.shape());
                let rule = format!("type F32 and the shape of row_negatives, which is {:?}", view.shape());
                return Err(tensor_error("row_negatives_log_q", found, rule));
            }
        };
        let row = |(at, row): (usize, i64)| match row {
            -1 => Ok(RowNegatives::NONE),
            row if (0..i64::from(RowNegatives::NONE)).contains(&row) => Ok(row as u32),
            row => {
                let rule = "a row of the table: 0 <= row < 2^32 - 1, or -1 for none";
                Err(tensor_error("row_negatives", format!("{row} at element {at}"), rule.into()))
            }
        };
        let rows = elements::<i64>(view.data()).into_iter().enumerate().map(row).collect::<Result<_>>()?;
        Ok(Some(RowNegativesData { rows, per_row, log_q }))
    }

    fn rows(&self, name: &'static str, rule: &str) -> Result<Option<Vec<u32>>> {
        let Some(rows) = self.vector::<i64>(name, Dtype::I64)? else { return Ok(None) };
        let in_range = |(row, &index): (usize, &i64)| {
            u32::try_from(index).map_err(|_| tensor_error(name, format!("{index} in row {row}"), rule.into()))
        };
        Ok(Some(rows.iter().enumerate().map(in_range).collect::<Result<_>>()?))
    }

    fn positives(&self, dim: usize) -> Result<PositiveData> {
        let rule = "an index of a candidate: 0 <= index < 2^32";
        match (self.rows("positives", rule)?, self.has("positive_embeddings")) {
            (Some(_), true) => Err(tensor_error("positives", "positive_embeddings beside it", "one of the two".into())),
            (None, true) => Ok(PositiveData::Separate(self.matrix_of("positive_embeddings", dim)?)),
            (None, false) => Err(missing("positives", "a batch has positives or positive_embeddings")),
            (Some(positives), false) => Ok(PositiveData::Index(positives)),
        }
    }

    /// The results that the file holds, each of the shape that the problem gives it.
    fn expected(&self, problem: &Problem) -> Result<Expected> {
        let (b, n, d) = (problem.num_queries(), problem.num_candidates(), problem.dim);
        let (p, m) = (problem.num_pairs(), problem.table_rows());
        let mut expected = Expected::new();
        for result in RESULTS {
            let shapes: &[&[usize]] = match result {
                "total" | "d_temperature" => &[&[], &[1]],
                "positive" => &[&[p]],
                "d_queries" => &[&[b, d]],
                "d_positive_embeddings" => &[&[p, d]],
                "d_candidates" => &[&[n, d]],
                "d_table" => &[&[m, d]],
                _ => &[&[b]],
            };
            let name = format!("expected.{result}");
            if let Ok(view) = self.tensors.tensor(&name) {
                if let Some((found, rule)) = out_of_place(result, problem) {
                    return Err(tensor_error(name, found, rule.into()));
                }
                if !shapes.contains(&view.shape()) {
                    return Err(tensor_error(name, format!("shape {:?}", view.shape()), format!("{:?}", shapes[0])));
                }
                expected.insert(result, tensor(&name, &view)?);
            }
        }
        Ok(expected)
    }

    /// A matrix and its width.
    fn matrix(&self, name: &'static str) -> Result<(Storage, usize)> {
        let view = self.tensors.tensor(name).map_err(|_| missing(name, "every batch has it"))?;
        let &[rows, dim] = view.shape() else {
            return Err(tensor_error(name, format!("shape {:?}", view.shape()), "two axes".into()));
        };
        if rows == 0 || dim == 0 {
            return Err(tensor_error(name, format!("shape {:?}", view.shape()), "rows >= 1 and dim >= 1".into()));
        }
        let elements = match view.dtype() {
            Dtype::F32 => Storage::F32(elements(view.data())),
            Dtype::F16 => Storage::F16(elements::<f16>(view.data())),
            Dtype::BF16 => Storage::Bf16(elements::<bf16>(view.data())),
            other => return Err(tensor_error(name, format!("type {other:?}"), "F32, F16 or BF16".into())),
        };
        Ok((elements, dim))
    }

    fn matrix_of(&self, name: &'static str, dim: usize) -> Result<Storage> {
        let (matrix, found) = self.matrix(name)?;
        if found != dim {
            return Err(tensor_error(name, format!("dim {found}"), format!("the dim of queries, which is {dim}")));
        }
        Ok(matrix)
    }

    /// An optional vector; its length is the batch's to check.
    fn vector<T: bytemuck::Pod>(&self, name: &'static str, dtype: Dtype) -> Result<Option<Vec<T>>> {
        let Ok(view) = self.tensors.tensor(name) else { return Ok(None) };
        if view.shape().len() != 1 || view.dtype() != dtype {
            let found = format!("type {:?} and shape {:?}", view.dtype(), view.shape());
            return Err(tensor_error(name, found, format!("type {dtype:?} and one axis")));
        }
        Ok(Some(elements(view.data())))
    }

    /// Ids are compared for equality only: I64 in the file, the same 64 bits here.
    fn ids(&self, name: &'static str) -> Result<Option<Vec<u64>>> {
        self.vector(name, Dtype::I64)
    }
}

/// Why a problem has no such result.
fn out_of_place(result: &str, problem: &Problem) -> Option<(&'static str, &'static str)> {
    match (result, &problem.table, &problem.positives) {
        ("d_candidates", Some(_), _) => Some(("a table beside it", "a table's gradient is expected.d_table")),
        ("d_table", None, _) => Some(("no table beside it", "candidates have their gradient in expected.d_candidates")),
        ("d_positive_embeddings", _, PositiveData::Index(_)) => {
            Some(("positives by index beside it", "positives by index have their gradient in expected.d_candidates"))
        }
        _ => None,
    }
}

struct Options<'a>(&'a HashMap<String, String>);

impl Options<'_> {
    fn loss(&self, has_log_q: bool) -> Result<Loss> {
        if let Some(key) = self.0.keys().find(|key| !METADATA.contains(&key.as_str())) {
            return Err(metadata_error(key, "not a known key", format!("one of {METADATA:?}")));
        }
        let similarity =
            self.choice("similarity", None, &[("cosine", Similarity::Cosine), ("dot", Similarity::Dot)])?;
        let reductions = [
            ("mean", Reduction::Mean),
            ("sum", Reduction::Sum),
            ("weighted_mean", Reduction::WeightedMean),
            ("none", Reduction::None),
        ];
        let loss = Loss::softmax(similarity, self.temperature()?)
            .correction(self.correction(has_log_q)?)
            .reduction(self.choice("reduction", Some("mean"), &reductions)?);
        let loss = match (self.number("false_negative_margin")?, self.number("false_negative_ratio")?) {
            (Some(_), Some(ratio)) => {
                let rule = "one of false_negative_margin and false_negative_ratio".into();
                return Err(metadata_error("false_negative_ratio", ratio.to_string(), rule));
            }
            (Some(margin), None) => loss.false_negative_margin(margin),
            (None, Some(ratio)) => loss.false_negative_ratio(ratio),
            (None, None) => loss,
        };
        Ok(if self.flag("symmetric", "false")? { loss.symmetric() } else { loss })
    }

    fn correction(&self, has_log_q: bool) -> Result<Correction> {
        let corrected = self.choice("loss", None, &[("softmax", false), ("corrected_logq", true)])?;
        let correct_positive = self.flag("correct_positive", "true")?;
        Ok(match (corrected, has_log_q, correct_positive) {
            (true, _, _) => Correction::CorrectedLogQ,
            (false, false, _) => Correction::None,
            (false, true, true) => Correction::LogQ,
            (false, true, false) => Correction::LogQNegativesOnly,
        })
    }

    fn temperature(&self) -> Result<f64> {
        self.value("temperature", None)?;
        Ok(self.number("temperature")?.expect("it is there"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(text) = self.0.get(key) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| metadata_error(key, format!("{text:?}"), "a number".into()))
    }

    fn flag(&self, key: &str, default: &str) -> Result<bool> {
        self.choice(key, Some(default), &[("true", true), ("false", false)])
    }

    fn choice<T: Copy>(&self, key: &str, default: Option<&str>, choices: &[(&str, T)]) -> Result<T> {
        let text = self.value(key, default)?;
        let found = choices.iter().find(|(name, _)| *name == text);
        let names = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        found.map(|&(_, value)| value).ok_or_else(|| metadata_error(key, format!("{text:?}"), names()))
    }

    fn value<'b>(&'b self, key: &str, default: Option<&'b str>) -> Result<&'b str> {
        let found = self.0.get(key).map(String::as_str).or(default);
        found.ok_or_else(|| metadata_error(key, "missing", "every file states it".into()))
    }
}

fn tensor(name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    let counts = name == "expected.num_negatives";
    let values = match view.dtype() {
        Dtype::I64 if counts => elements::<i64>(view.data()).into_iter().map(|v| v as f64).collect(),
        Dtype::F32 if !counts => elements::<f32>(view.data()).into_iter().map(f64::from).collect(),
        Dtype::F64 if !counts => elements(view.data()),
        other => {
            let rule = if counts { "I64" } else { "F64 or F32" };
            return Err(tensor_error(name, format!("type {other:?}"), rule.into()));
        }
    };
    Ok(Tensor { values, shape: view.shape().to_vec(), dtype: view.dtype() })
}

/// The bytes of a tensor as numbers. A copy, because a file's tensors need not be aligned.
fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    let mut values = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
    values
}

fn missing(name: impl Into<String>, rule: &'static str) -> LoadError {
    LoadError::MissingTensor { name: name.into(), rule }
}

fn tensor_error(name: impl Into<String>, found: impl Into<String>, rule: String) -> LoadError {
    LoadError::Tensor { name: name.into(), found: found.into(), rule }
}

fn metadata_error(key: impl Into<String>, found: impl Into<String>, rule: String) -> LoadError {
    LoadError::Metadata { key: key.into(), found: found.into(), rule }
}
