//! The temperature of each step: fixed, scheduled or learned, by the crate's own.

use std::ops::RangeInclusive;

use catalog_softmax::Error;
use catalog_softmax::temperature::{LearnedTemperature, TemperatureSchedule};
use clap::ValueEnum;

use crate::model::Model;
use crate::options::Options;

/// A learned temperature stays in here: below, f32 scores of ±1/τ lose the resolution that ranking needs; above, the
/// cosine's range of 2/τ is too narrow for any softmax.
pub const LEARNED_RANGE: RangeInclusive<f64> = 0.01..=1.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Schedule {
    Constant,
    Linear,
    Cosine,
    Exponential,
}

impl Schedule {
    fn between(self, from: f64, to: f64) -> Result<TemperatureSchedule, Error> {
        match self {
            Schedule::Constant => TemperatureSchedule::constant(from),
            Schedule::Linear => TemperatureSchedule::linear(from, to),
            Schedule::Cosine => TemperatureSchedule::cosine(from, to),
            Schedule::Exponential => TemperatureSchedule::exponential(from, to),
        }
    }
}

/// The temperature for a step at `progress` (0 to 1) through the training.
pub fn current(options: &Options, model: &Model, progress: f64) -> Result<f64, Error> {
    if options.learn_temperature {
        return Ok(f64::from(model.log_temperature.values[0]).exp());
    }
    let to = options.final_temperature.unwrap_or(options.temperature);
    Ok(options.temperature_schedule.between(options.temperature, to)?.at_progress(progress))
}

/// Brings a learned temperature back into its range.
pub fn clamp(model: &mut Model) -> Result<(), Error> {
    let log_temperature = &mut model.log_temperature.values[0];
    let mut learned = LearnedTemperature::new(*LEARNED_RANGE.end(), LEARNED_RANGE)?;
    learned.set_log_scale(-f64::from(*log_temperature));
    *log_temperature = -learned.log_scale() as f32;
    Ok(())
}
