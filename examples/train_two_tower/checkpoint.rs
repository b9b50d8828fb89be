//! Checkpoints: a safetensors file with the model, the optimiser's state and the curve so far.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `items`, `history`, `weight`, `bias`, `log_temperature` | (rows, dim) F32 | the parameters |
//! | `<parameter>.accumulator` | (rows) F32 | the state of row-wise Adagrad |
//! | `queue`, `frequencies` | (bytes) U8 | what past steps left for later ones: queued targets, estimates of Q |
//! | `curve` | (epochs, 4) F64 | train loss, temperature, validation Recall@10 and NDCG@10 of each epoch |
//!
//! The metadata has the settings that a resumed run must share, and `item_names`: the JSON list of the items of the
//! tables' rows. The number of epochs done is the curve's length; a generator's state is a function of seed and epoch.

use std::collections::HashMap;
use std::path::Path;

use bytemuck::{AnyBitPattern, NoUninit, cast_slice};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView};

use crate::Fallible;
use crate::model::Model;
use crate::negatives::Negatives;
use crate::objective::Objective;
use crate::options::Options;
use crate::parameter::Parameter;
use crate::train::{EpochPoint, Run};

/// The state of a training run after an epoch.
pub struct Checkpoint {
    pub model: Model,
    pub curve: Vec<EpochPoint>,
    /// As [`Candidates::save`](crate::candidates::Candidates::save) returned them.
    pub pools: [Vec<u8>; 2],
}

/// The tensors of [`Checkpoint::pools`].
const POOLS: [&str; 2] = ["queue", "frequencies"];

/// Name and value of each setting that decides what a run computes.
pub type Settings = Vec<(&'static str, String)>;

pub fn settings(run: &Run<'_>) -> Settings {
    let Options { batch, dim, history, learning_rate, temperature, learn_temperature, .. } = run.options;
    let Objective { negatives, log_q, correction, .. } = run.objective;
    let schedule = match run.options.final_temperature {
        None => "constant".to_string(),
        // A schedule runs over all epochs: another number of epochs is another schedule.
        Some(to) => format!("{:?} to {to} in {} epochs", run.options.temperature_schedule, run.options.epochs),
    };
    vec![
        ("negatives", negatives.as_ref().map_or("all items".to_string(), Negatives::to_string)),
        ("log_q", format!("{log_q:?}")),
        ("correction", format!("{correction:?}")),
        ("seed", run.seed.to_string()),
        ("batch", batch.to_string()),
        ("dim", dim.to_string()),
        ("history", history.to_string()),
        ("learning_rate", learning_rate.to_string()),
        ("temperature", temperature.to_string()),
        ("temperature_schedule", schedule),
        ("learn_temperature", learn_temperature.to_string()),
        ("training_examples", run.split.train.len().to_string()),
    ]
}

/// Writes the checkpoint, or leaves the one at `path` as it was: the file is complete before it gets its name.
pub fn save(path: &Path, checkpoint: &Checkpoint, settings: &Settings, item_names: &[String]) -> Fallible<()> {
    let curve: Vec<f64> = checkpoint.curve.iter().flat_map(|&point| row(point)).collect();
    let mut tensors = vec![tensor("curve", Dtype::F64, vec![checkpoint.curve.len(), 4], &curve)?];
    for (name, bytes) in POOLS.into_iter().zip(&checkpoint.pools) {
        tensors.push(tensor(name, Dtype::U8, vec![bytes.len()], bytes)?);
    }
    for (name, parameter) in checkpoint.model.parameters() {
        let Parameter { rows, dim, values, accumulator } = parameter;
        tensors.push(tensor(name, Dtype::F32, vec![*rows, *dim], values)?);
        tensors.push(tensor(&accumulator_name(name), Dtype::F32, vec![*rows], accumulator)?);
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

/// Reads a checkpoint that was written with the same settings on the same items.
pub fn load(path: &Path, settings: &Settings, item_names: &[String]) -> Fallible<Checkpoint> {
    let in_file = |e: &dyn std::fmt::Display| format!("checkpoint {}: {e}", path.display());
    let bytes = std::fs::read(path).map_err(|e| in_file(&e))?;
    parse(&bytes, settings, item_names).map_err(|e| in_file(&e).into())
}

fn parse(bytes: &[u8], settings: &Settings, item_names: &[String]) -> Fallible<Checkpoint> {
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    check_metadata(&metadata, settings, item_names)?;
    let tensors = SafeTensors::deserialize(bytes)?;
    let curve: Vec<f64> = values(&tensors, "curve", Dtype::F64)?;
    let dim = tensors.tensor("items")?.shape().last().copied().unwrap_or(0);
    let mut model = Model::zeros(item_names.len(), dim);
    for (name, parameter) in model.parameters_mut() {
        fill(&mut parameter.values, values(&tensors, name, Dtype::F32)?, name)?;
        let name = accumulator_name(name);
        fill(&mut parameter.accumulator, values(&tensors, &name, Dtype::F32)?, &name)?;
    }
    let [queue, frequencies] = POOLS.map(|name| values(&tensors, name, Dtype::U8));
    Ok(Checkpoint { model, curve: curve.chunks_exact(4).map(point).collect(), pools: [queue?, frequencies?] })
}

fn check_metadata(metadata: &Metadata, settings: &Settings, item_names: &[String]) -> Fallible<()> {
    let state = metadata.metadata().as_ref().and_then(|map| map.get("train_two_tower"));
    let state: serde_json::Value = serde_json::from_str(state.ok_or("not written by train_two_tower")?)?;
    for (name, here) in settings {
        let there = state["settings"][name].as_str().unwrap_or("missing");
        if there != here {
            return Err(format!("{name} is {there} there and {here} here").into());
        }
    }
    if state["item_names"] != serde_json::json!(item_names) {
        return Err("it was trained on other items".into());
    }
    Ok(())
}

fn accumulator_name(parameter: &str) -> String {
    format!("{parameter}.accumulator")
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

fn fill(into: &mut Vec<f32>, values: Vec<f32>, name: &str) -> Fallible<()> {
    if values.len() != into.len() {
        return Err(format!("tensor {name} has {} elements, expected {}", values.len(), into.len()).into());
    }
    *into = values;
    Ok(())
}

fn row(point: EpochPoint) -> [f64; 4] {
    [point.train_loss, point.temperature, point.validation_recall_at_10, point.validation_ndcg_at_10]
}

fn point(row: &[f64]) -> EpochPoint {
    EpochPoint {
        train_loss: row[0],
        temperature: row[1],
        validation_recall_at_10: row[2],
        validation_ndcg_at_10: row[3],
    }
}
