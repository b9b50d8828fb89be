//! Golden batches as files: which a folder holds, and how one is written.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use catalog_softmax::{Correction, FalseNegativeFilter, Loss, Reduction, RowNegatives, Similarity};
use half::slice::HalfFloatSliceExt;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, serialize};

use super::golden::{Golden, Tensor};
use super::problem::{PoolRows, PositiveData, Problem, RowNegativesData, Storage};

/// The safetensors files of a folder, by name.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    assert!(!files.is_empty(), "golden batches in {}", folder.display());
    files
}

/// A tensor of a file: name, type, shape, bytes.
type Part = (String, Dtype, Vec<usize>, Vec<u8>);

/// The file that holds a golden batch.
pub fn to_bytes(golden: &Golden) -> Result<Vec<u8>, SafeTensorError> {
    let mut parts = inputs(&golden.problem);
    for (name, tensor) in &golden.expected {
        parts.push((format!("expected.{name}"), tensor.dtype, tensor.shape.clone(), stored(tensor)));
    }
    let views = parts
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?)));
    serialize(views.collect::<Result<Vec<_>, SafeTensorError>>()?, Some(options(&golden.problem.loss)))
}

/// The values in the type in which they were computed.
pub fn stored(tensor: &Tensor) -> Vec<u8> {
    let values = tensor.values.iter();
    match tensor.dtype {
        Dtype::F32 => values.flat_map(|&v| (v as f32).to_le_bytes()).collect(),
        Dtype::I64 => values.flat_map(|&v| (v as i64).to_le_bytes()).collect(),
        _ => values.flat_map(|&v| v.to_le_bytes()).collect(),
    }
}

fn inputs(problem: &Problem) -> Vec<Part> {
    let pool = problem.pools.first();
    let mut parts = vec![matrix("queries", &problem.queries, problem.dim)];
    match (&problem.table, pool) {
        (Some(table), _) => parts.push(matrix("table", &table.embeddings, problem.dim)),
        (None, Some(pool)) => parts.push(matrix("candidates", &pool.candidates, problem.dim)),
        (None, None) => panic!("a problem without a table has a pool"),
    }
    let rows = |rows: &[u32]| rows.iter().map(|&row| u64::from(row)).collect::<Vec<u64>>();
    let offsets = |offsets: &[i64]| offsets.iter().map(|&offset| offset as u64).collect::<Vec<u64>>();
    let candidate_rows = match pool.and_then(|pool| pool.rows.as_ref()) {
        Some(PoolRows::These(these)) => Some(rows(these)),
        Some(PoolRows::All) | None => None,
    };
    let positives = match &problem.positives {
        PositiveData::Index(index) => Some(rows(index)),
        PositiveData::Separate(embeddings) => {
            parts.push(matrix("positive_embeddings", embeddings, problem.dim));
            None
        }
    };
    let excluded = problem.excluded.as_ref();
    let integers = [
        ("positives", positives),
        ("candidate_rows", candidate_rows),
        ("positive_offsets", problem.positive_offsets.as_deref().map(offsets)),
        ("candidate_ids", pool.and_then(|pool| pool.ids.clone())),
        ("positive_ids", problem.positive_ids.clone()),
        ("exclude_offsets", excluded.map(|(all, _)| offsets(all))),
        ("exclude_ids", excluded.map(|(_, ids)| ids.clone())),
    ];
    parts.extend(integers.into_iter().filter_map(|(name, ids)| Some(vector(name, Dtype::I64, ids?.into_iter()))));
    let floats = [
        ("log_q", pool.and_then(|pool| pool.log_q.as_ref())),
        ("positive_log_q", problem.positive_log_q.as_ref()),
        ("positive_weight", problem.positive_weight.as_ref()),
        ("row_weight", problem.row_weight.as_ref()),
    ];
    let floats = floats.into_iter().filter_map(|(name, values)| Some((name, values?.iter().copied())));
    parts.extend(floats.map(|(name, values)| vector(name, Dtype::F32, values)));
    if let Some(negatives) = &problem.row_negatives {
        parts.extend(row_negatives(negatives));
    }
    parts
}

fn row_negatives(negatives: &RowNegativesData) -> Vec<Part> {
    let signed = |row: u32| if row == RowNegatives::NONE { -1 } else { i64::from(row) };
    let mut parts = vec![vector("row_negatives", Dtype::I64, negatives.rows.iter().map(|&row| signed(row)))];
    let log_q = negatives.log_q.as_ref();
    parts.extend(log_q.map(|log_q| vector("row_negatives_log_q", Dtype::F32, log_q.iter().copied())));
    let shape = vec![negatives.rows.len() / negatives.per_row, negatives.per_row];
    parts.iter_mut().for_each(|part| part.2 = shape.clone());
    parts
}

fn matrix(name: &str, storage: &Storage, dim: usize) -> Part {
    let (dtype, bytes) = match storage {
        Storage::F32(v) => (Dtype::F32, bytemuck::cast_slice(v).to_vec()),
        Storage::F16(v) => (Dtype::F16, bytemuck::cast_slice(v.reinterpret_cast()).to_vec()),
        Storage::Bf16(v) => (Dtype::BF16, bytemuck::cast_slice(v.reinterpret_cast()).to_vec()),
    };
    (name.to_string(), dtype, vec![storage.len() / dim, dim], bytes)
}

fn vector<T: bytemuck::NoUninit>(name: &str, dtype: Dtype, values: impl Iterator<Item = T>) -> Part {
    let values: Vec<T> = values.collect();
    (name.to_string(), dtype, vec![values.len()], bytemuck::cast_slice(&values).to_vec())
}

fn options(loss: &Loss) -> HashMap<String, String> {
    let similarity = match loss.similarity {
        Similarity::Cosine => "cosine",
        Similarity::Dot => "dot",
        other => panic!("files have no name for {other:?}"),
    };
    let reduction = match loss.reduction {
        Reduction::None => "none",
        Reduction::Mean => "mean",
        Reduction::Sum => "sum",
        Reduction::WeightedMean => "weighted_mean",
        other => panic!("files have no name for {other:?}"),
    };
    let corrected = loss.correction == Correction::CorrectedLogQ;
    let options = [
        ("similarity", similarity.to_string()),
        ("temperature", loss.temperature.to_string()),
        ("loss", if corrected { "corrected_logq" } else { "softmax" }.to_string()),
        ("correct_positive", (loss.correction != Correction::LogQNegativesOnly).to_string()),
        ("reduction", reduction.to_string()),
        ("symmetric", loss.symmetric.to_string()),
    ];
    let filter = match loss.false_negatives {
        Some(FalseNegativeFilter::Margin(margin)) => Some(("false_negative_margin", margin.to_string())),
        Some(FalseNegativeFilter::Ratio(ratio)) => Some(("false_negative_ratio", ratio.to_string())),
        None => None,
        Some(other) => panic!("files have no name for {other:?}"),
    };
    options.into_iter().chain(filter).map(|(key, value)| (key.to_string(), value)).collect()
}
