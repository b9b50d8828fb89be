//! The temperature of each step: fixed, scheduled or learned.

use std::f64::consts::PI;
use std::ops::RangeInclusive;

use clap::ValueEnum;

use crate::model::Model;
use crate::options::Options;

/// A learned temperature stays in here: below, f32 scores of ±1/τ lose the resolution that ranking needs; above, the
/// cosine's range of 2/τ is too narrow for any softmax.
const LEARNED_RANGE: RangeInclusive<f64> = 0.01..=1.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Schedule {
    Constant,
    Linear,
    Cosine,
}

impl Schedule {
    /// The temperature when `progress` (0 to 1) of the training is done.
    fn at(self, progress: f64, from: f64, to: f64) -> f64 {
        let moved = match self {
            Schedule::Constant => 0.0,
            Schedule::Linear => progress,
            Schedule::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
        };
        from + moved * (to - from)
    }
}

/// The temperature for a step at `progress` (0 to 1) through the training.
pub fn current(options: &Options, model: &Model, progress: f64) -> f64 {
    if options.learn_temperature {
        return f64::from(model.log_temperature.values[0]).exp();
    }
    let to = options.final_temperature.unwrap_or(options.temperature);
    options.temperature_schedule.at(progress, options.temperature, to)
}

/// Brings a learned temperature back into its range.
pub fn clamp(model: &mut Model) {
    let (low, high) = (LEARNED_RANGE.start().ln() as f32, LEARNED_RANGE.end().ln() as f32);
    model.log_temperature.values[0] = model.log_temperature.values[0].clamp(low, high);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_and_end_where_they_should() {
        for schedule in [Schedule::Linear, Schedule::Cosine] {
            assert_eq!(schedule.at(0.0, 0.2, 0.05), 0.2);
            assert!((schedule.at(0.5, 0.2, 0.05) - 0.125).abs() < 1e-12);
            assert!((schedule.at(1.0, 0.2, 0.05) - 0.05).abs() < 1e-12);
        }
        assert_eq!(Schedule::Constant.at(0.7, 0.2, 0.05), 0.2);
    }
}
