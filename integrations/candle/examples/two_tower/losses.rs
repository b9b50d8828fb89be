//! The losses that `examples/train_two_tower` has names for, as calls of `softmax_loss`.

use candle_core::{Device, Result, Tensor};
use catalog_softmax_candle::catalog_softmax::negatives::{Distribution, RandomStream, Uniform};
use catalog_softmax_candle::{Correction, Options, Reduction, softmax_loss};

use crate::Fallible;
use crate::negatives::Sampled;
use crate::objective::Objective;
use crate::split::Split;
use crate::towers::Towers;

/// What a training step gives to the loss.
pub struct Step<'a> {
    pub towers: &'a Towers,
    /// (B, D), the query tower's output.
    pub queries: &'a Tensor,
    /// (B) items.
    pub targets: &'a [u32],
    /// Of each row, items that are no negatives of it: the query's own history.
    pub excluded: &'a [&'a [u32]],
    pub split: &'a Split,
}

impl Step<'_> {
    /// Summed over the batch, as train_two_tower does.
    pub fn loss(&self, objective: &Objective, temperature: f64, random: &mut RandomStream) -> Fallible<Tensor> {
        let options = Options {
            temperature: temperature.into(),
            correction: objective.correction,
            reduction: Reduction::Sum,
            excluded: Some(self.excluded()?),
            ..Options::default()
        };
        match &objective.negatives {
            None => self.full(options),
            Some(negatives) if negatives.in_batch => self.in_batch(options),
            Some(negatives) => self.sampled(negatives.sampled[0], options, random),
        }
    }

    /// The items of the batch are its candidates: item i is the positive of row i.
    fn in_batch(&self, options: Options) -> Fallible<Tensor> {
        let targets = vector(self.targets)?;
        let log_q: Vec<f32> = self.targets.iter().map(|&item| self.split.log_q[item as usize]).collect();
        let options = Options {
            candidate_ids: Some(targets.clone()),
            log_q: (options.correction != Correction::None).then(|| vector(&log_q)).transpose()?,
            ..options
        };
        Ok(softmax_loss(self.queries, &self.towers.items.index_select(&targets, 0)?, &options)?)
    }

    /// Uniform draws are the candidates, and positives are apart from them.
    fn sampled(&self, sampled: Sampled, options: Options, random: &mut RandomStream) -> Fallible<Tensor> {
        let drawn = Uniform::new(self.split.num_items() as u64)?.draw(sampled.draws, random)?;
        let ids: Vec<u32> = drawn.ids.iter().map(|&id| id as u32).collect();
        let (ids, targets) = (vector(&ids)?, vector(self.targets)?);
        // Of one row per draw, the same for every item: the candidates' is the positives', too.
        let of_positives = vec![drawn.log_q[0]; self.targets.len()];
        let options = Options {
            candidate_ids: Some(ids.clone()),
            log_q: Some(vector(&drawn.log_q)?),
            positive_embeddings: Some(self.towers.items.index_select(&targets, 0)?),
            positive_ids: Some(targets),
            positive_log_q: Some(vector(&of_positives)?),
            ..options
        };
        Ok(softmax_loss(self.queries, &self.towers.items.index_select(&ids, 0)?, &options)?)
    }

    /// Every item is a candidate.
    fn full(&self, options: Options) -> Fallible<Tensor> {
        let every = Tensor::arange(0, self.split.num_items() as u32, &Device::Cpu)?;
        let options = Options { positives: Some(vector(self.targets)?), candidate_ids: Some(every), ..options };
        Ok(softmax_loss(self.queries, &self.towers.items, &options)?)
    }

    fn excluded(&self) -> Result<(Tensor, Tensor)> {
        let (mut offsets, mut items) = (vec![0i64], Vec::new());
        for row in self.excluded {
            items.extend_from_slice(row);
            offsets.push(items.len() as i64);
        }
        Ok((vector(&offsets)?, vector(&items)?))
    }
}

fn vector<T: candle_core::WithDType>(values: &[T]) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), &Device::Cpu)
}
