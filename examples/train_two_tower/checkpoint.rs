//! Checkpoints: a safetensors file with the model that is tested, and the state from which the training goes on.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `items` | (N, D) F32 | **the item embeddings**: row j is item j of `item_names`; scores are cosines with them |
//! | `history`, `weight`, `bias` | (N, D), (D, D), (1, D) F32 | the query tower, as `model.rs` says |
//! | `log_temperature` | (1, 1) F32 | its value with `--learn-temperature` |
//! | `last.items`, `last.history`, ... | the same | parameters after the last epoch, if it was not the best |
//! | `<parameter>.optimizer` | (bytes) U8 | row-wise Adagrad after the last epoch, by `Optimizer::to_bytes` |
//! | `queue`, `frequencies` | (bytes) U8 | what past steps left for later ones: queued targets, estimates of Q |
//! | `curve` | (epochs, 4) F64 | train loss, temperature, validation Recall@10 and NDCG@10 (or NaN) of each epoch |
//!
//! The parameters without a prefix are those of the epoch with the best validation NDCG@10, or of the last epoch where
//! there is no validation. The metadata has one entry, `train_two_tower`: JSON with `item_names`, the list of the items
//! of the tables' rows, and `settings`, which a resumed run must share: the data's hash and every option that changes
//! what is computed. (The device is not among them. It changes rounding alone.) The number of epochs done is the
//! curve's length; a generator's state is a function of seed and epoch.

use std::collections::HashMap;
use std::path::Path;

use bytemuck::{AnyBitPattern, NoUninit, cast_slice};
use catalog_softmax::optimizer::Optimizer;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView};

use crate::Fallible;
use crate::model::Model;
use crate::negatives::Negatives;
use crate::objective::Objective;
use crate::options::Options;
use crate::parameter::Parameter;
use crate::train::{EpochPoint, Run, Validation};

/// The state of a training run after an epoch.
pub struct Checkpoint {
    /// After the last epoch.
    pub model: Model,
    /// After the best one, where that was not the last.
    pub best: Option<Model>,
    pub curve: Vec<EpochPoint>,
    /// As [`Candidates::save`](crate::candidates::Candidates::save) returned them.
    pub pools: [Vec<u8>; 2],
}

impl Checkpoint {
    /// The model of the best epoch.
    pub fn best_model(&self) -> &Model {
        self.best.as_ref().unwrap_or(&self.model)
    }
}

/// The tensors of [`Checkpoint::pools`].
const POOLS: [&str; 2] = ["queue", "frequencies"];
/// What the names of the last epoch's parameters begin with where another epoch was the best.
const LAST: &str = "last.";

/// Name and value of each setting that decides what a run computes.
pub type Settings = Vec<(&'static str, String)>;

/// The setting that is the data's hash.
const DATA: &str = "data";

pub fn settings(run: &Run<'_>) -> Settings {
    let Options { batch, dim, history, next, learning_rate, temperature, learn_temperature, evaluate, .. } =
        run.options;
    let Objective { negatives, log_q, correction, .. } = run.objective;
    let schedule = match run.options.final_temperature {
        None => "constant".to_string(),
        // A schedule runs over all epochs: another number of epochs is another schedule.
        Some(to) => format!("{:?} to {to:?} in {} epochs", run.options.temperature_schedule, run.options.epochs),
    };
    vec![
        (DATA, run.split.fingerprint.clone()),
        ("--negatives", negatives.as_ref().map_or("all items".to_string(), Negatives::to_string)),
        ("--log-q", format!("{log_q:?}")),
        ("--correction", format!("{correction:?}")),
        ("--next", next.to_string()),
        ("--false-negative-margin", given(run.options.false_negative_margin)),
        ("--false-negative-ratio", given(run.options.false_negative_ratio)),
        ("--seeds", run.seed.to_string()),
        ("--batch", batch.to_string()),
        ("--dim", dim.to_string()),
        ("--history", history.to_string()),
        ("--learning-rate", format!("{learning_rate:?}")),
        ("--temperature", format!("{temperature:?}")),
        ("--temperature-schedule", schedule),
        ("--learn-temperature", learn_temperature.to_string()),
        ("--evaluate", evaluate.map_or("all users".to_string(), |users| format!("{users} users"))),
    ]
}

fn given(option: Option<f64>) -> String {
    option.map_or("none".to_string(), |value| format!("{value:?}"))
}

/// Writes the checkpoint, or leaves the one at `path` as it was: the file is complete before it gets its name.
pub fn save(path: &Path, checkpoint: &Checkpoint, settings: &Settings, item_names: &[String]) -> Fallible<()> {
    let curve: Vec<f64> = checkpoint.curve.iter().flat_map(|&point| row(point)).collect();
    let mut tensors = vec![tensor("curve", Dtype::F64, vec![checkpoint.curve.len(), 4], &curve)?];
    for (name, bytes) in POOLS.into_iter().zip(&checkpoint.pools) {
        tensors.push(tensor(name, Dtype::U8, vec![bytes.len()], bytes)?);
    }
    for (name, Parameter { rows, dim, values, .. }) in checkpoint.best_model().parameters() {
        tensors.push(tensor(name, Dtype::F32, vec![*rows, *dim], values)?);
    }
    let optimizers = checkpoint.model.parameters().map(|(_, parameter)| parameter.optimizer.to_bytes());
    for ((name, Parameter { rows, dim, values, .. }), bytes) in
        checkpoint.model.parameters().into_iter().zip(&optimizers)
    {
        tensors.push(tensor(&optimizer_name(name), Dtype::U8, vec![bytes.len()], bytes)?);
        if checkpoint.best.is_some() {
            tensors.push(tensor(&format!("{LAST}{name}"), Dtype::F32, vec![*rows, *dim], values)?);
        }
    }
    // One entry: a map of several would be written in an order that changes from run to run.
    let state = serde_json::json!({
        "settings": settings.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "item_names": item_names,
    });
    let metadata = HashMap::from([("train_two_tower".to_string(), state.to_string())]);
    let bytes = safetensors::serialize(tensors, Some(metadata))?;
    let unfinished = path.with_extension("unfinished");
    std::fs::write(&unfinished, bytes).map_err(|e| format!("{}: {e}", unfinished.display()))?;
    std::fs::rename(&unfinished, path).map_err(|e| format!("{}: {e}", path.display()).into())
}

/// Reads a checkpoint that was written with the same settings on the same data. The tables are (num_items, dim).
pub fn load(path: &Path, settings: &Settings, num_items: usize, dim: usize) -> Fallible<Checkpoint> {
    let in_file = |e: &dyn std::fmt::Display| format!("--resume: checkpoint {}: {e}", path.display());
    let bytes = std::fs::read(path).map_err(|e| in_file(&e))?;
    parse(&bytes, settings, num_items, dim).map_err(|e| in_file(&e).into())
}

fn parse(bytes: &[u8], settings: &Settings, num_items: usize, dim: usize) -> Fallible<Checkpoint> {
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    check_metadata(&metadata, settings)?;
    let tensors = SafeTensors::deserialize(bytes)?;
    let curve: Vec<f64> = values(&tensors, "curve", Dtype::F64)?;
    let mut model = Model::zeros(num_items, dim)?;
    let mut best = None;
    if tensors.tensor(&format!("{LAST}items")).is_ok() {
        let mut parameters = Model::zeros(num_items, dim)?;
        fill_model(&mut parameters, &tensors, "")?;
        best = Some(parameters);
    }
    fill_model(&mut model, &tensors, if best.is_some() { LAST } else { "" })?;
    for (name, parameter) in model.parameters_mut() {
        let name = optimizer_name(name);
        let bytes: Vec<u8> = values(&tensors, &name, Dtype::U8)?;
        parameter.optimizer = Optimizer::from_bytes(&bytes).map_err(|e| format!("tensor {name}: {e}"))?;
        let rows = parameter.optimizer.accumulator().map_or(0, <[f32]>::len);
        if rows != parameter.rows {
            return Err(format!("tensor {name} has the state of {rows} rows, expected {}", parameter.rows).into());
        }
    }
    if !model.is_finite() {
        return Err("it has parameters that are not finite".into());
    }
    let [queue, frequencies] = POOLS.map(|name| values(&tensors, name, Dtype::U8));
    Ok(Checkpoint { model, best, curve: curve.chunks_exact(4).map(point).collect(), pools: [queue?, frequencies?] })
}

/// Names everything that differs.
fn check_metadata(metadata: &Metadata, settings: &Settings) -> Fallible<()> {
    let state = metadata.metadata().as_ref().and_then(|map| map.get("train_two_tower"));
    let state: serde_json::Value = serde_json::from_str(state.ok_or("not written by train_two_tower")?)?;
    let mut differences = Vec::new();
    for (name, here) in settings {
        let there = state["settings"][name].as_str().unwrap_or("missing");
        if there != here && *name == DATA {
            let rule = "the same interactions in the same order";
            differences.push(format!("the data are others: their hash is {here}, and {there} there; rule: {rule}"));
        } else if there != here {
            differences.push(format!("{name} is {here}, and {there} there"));
        }
    }
    if differences.is_empty() { Ok(()) } else { Err(differences.join("; ").into()) }
}

fn optimizer_name(parameter: &str) -> String {
    format!("{parameter}.optimizer")
}

fn tensor<'a, T: NoUninit>(
    name: &str,
    dtype: Dtype,
    shape: Vec<usize>,
    values: &'a [T],
) -> Fallible<(String, TensorView<'a>)> {
    Ok((name.to_string(), TensorView::new(dtype, shape, cast_slice(values))?))
}

fn values<T: AnyBitPattern>(tensors: &SafeTensors<'_>, name: &str, dtype: Dtype) -> Fallible<Vec<T>> {
    let tensor = tensors.tensor(name)?;
    if tensor.dtype() != dtype {
        return Err(format!("tensor {name} has type {:?}, expected {dtype:?}", tensor.dtype()).into());
    }
    // The file's bytes need not be aligned as T is.
    Ok(tensor.data().chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
}

/// The values of all parameters, whose names in the file begin with `prefix`.
fn fill_model(model: &mut Model, tensors: &SafeTensors<'_>, prefix: &str) -> Fallible<()> {
    for (name, parameter) in model.parameters_mut() {
        let name = format!("{prefix}{name}");
        fill(&mut parameter.values, values(tensors, &name, Dtype::F32)?, &name)?;
    }
    Ok(())
}

fn fill(into: &mut Vec<f32>, values: Vec<f32>, name: &str) -> Fallible<()> {
    if values.len() != into.len() {
        return Err(format!("tensor {name} has {} elements, expected {}", values.len(), into.len()).into());
    }
    *into = values;
    Ok(())
}

fn row(point: EpochPoint) -> [f64; 4] {
    let validation = point.validation.unwrap_or(Validation { recall_at_10: f64::NAN, ndcg_at_10: f64::NAN });
    [point.train_loss, point.temperature, validation.recall_at_10, validation.ndcg_at_10]
}

fn point(row: &[f64]) -> EpochPoint {
    let validation = Validation { recall_at_10: row[2], ndcg_at_10: row[3] };
    EpochPoint {
        train_loss: row[0],
        temperature: row[1],
        validation: (!validation.ndcg_at_10.is_nan()).then_some(validation),
    }
}
