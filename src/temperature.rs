//! The temperature of each step: scheduled, or learned through its logarithm.

use std::f64::consts::PI;
use std::ops::RangeInclusive;

use crate::error::{Result, value};
use crate::problem::output::Gradients;

/// A temperature that moves from one value to another in the course of the training.
///
/// With `p` the part of the training that is done, 0 to 1:
///
/// | schedule | temperature |
/// |---|---|
/// | [`constant`](TemperatureSchedule::constant) | from |
/// | [`linear`](TemperatureSchedule::linear) | from + p (to − from) |
/// | [`cosine`](TemperatureSchedule::cosine) | from + (1 − cos πp)/2 · (to − from) |
/// | [`exponential`](TemperatureSchedule::exponential) | from^(1 − p) · to^p |
///
/// ```
/// use catalog_softmax::temperature::TemperatureSchedule;
/// use catalog_softmax::{Loss, Similarity};
/// let (schedule, steps) = (TemperatureSchedule::exponential(0.2, 0.05)?, 1000);
/// for step in 0..steps {
///     let loss = Loss::softmax(Similarity::Cosine, schedule.at(step, steps));
/// #   let _ = loss;
/// }
/// assert!((schedule.at(500, steps) - 0.1).abs() < 1e-12);
/// assert_eq!(schedule.at(steps, steps), 0.05);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TemperatureSchedule {
    shape: Shape,
    from: f64,
    to: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Linear,
    Cosine,
    Exponential,
}

impl TemperatureSchedule {
    /// The same temperature at every step.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) where a temperature is not finite and > 0, here and below.
    pub fn constant(temperature: f64) -> Result<Self> {
        check_temperature("temperature", temperature)?;
        Self::new(Shape::Linear, temperature, temperature)
    }

    /// In equal steps.
    ///
    /// # Errors
    /// As [`constant`](TemperatureSchedule::constant).
    pub fn linear(from: f64, to: f64) -> Result<Self> {
        Self::new(Shape::Linear, from, to)
    }

    /// Along half a period of the cosine: slow at both ends (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, for the
    /// learning rate).
    ///
    /// # Errors
    /// As [`constant`](TemperatureSchedule::constant).
    pub fn cosine(from: f64, to: f64) -> Result<Self> {
        Self::new(Shape::Cosine, from, to)
    }

    /// In equal factors: the logarithm moves in equal steps.
    ///
    /// # Errors
    /// As [`constant`](TemperatureSchedule::constant).
    pub fn exponential(from: f64, to: f64) -> Result<Self> {
        Self::new(Shape::Exponential, from, to)
    }

    fn new(shape: Shape, from: f64, to: f64) -> Result<Self> {
        check_temperature("from", from)?;
        check_temperature("to", to)?;
        Ok(TemperatureSchedule { shape, from, to })
    }

    /// The temperature of step `step` of `steps`, counted from 0. From `steps` on it is the last temperature of the
    /// schedule.
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        if step >= steps { self.to } else { self.at_progress(step as f64 / steps as f64) }
    }

    /// The temperature when the part `progress` of the training is done. A progress below 0 counts as 0, one above 1
    /// as 1.
    pub fn at_progress(&self, progress: f64) -> f64 {
        let &TemperatureSchedule { shape, from, to } = self;
        if progress >= 1.0 {
            // Exactly: `from + (to − from)` may round to a neighbour.
            return to;
        }
        let progress = progress.max(0.0);
        match shape {
            Shape::Linear => from + progress * (to - from),
            Shape::Cosine => from + 0.5 * (1.0 - (PI * progress).cos()) * (to - from),
            // Not `from (to/from)^p`, whose quotient may overflow.
            Shape::Exponential => from.powf(1.0 - progress) * to.powf(progress),
        }
    }
}

/// A temperature that is learned through the logarithm of its inverse, `s = ln(1 / tau)`, and kept in a range. CLIP's
/// logit scale is an example (Radford et al. 2021, section 2.5): it starts at tau = 0.07, and the scale `exp(s)` is
/// never above 100.
///
/// `s` is one more parameter of your optimiser. [`gradient`](LearnedTemperature::gradient) returns its gradient. Pass
/// the value that the optimiser computes to [`set_log_scale`](LearnedTemperature::set_log_scale), which clamps it to
/// the range. The parameter is thus clamped after the step, as in OpenCLIP, and gradients are not: at an end of the
/// range, a gradient that points outwards changes only the optimiser's own state, and the first one that points inwards
/// moves `s`.
///
/// ```
/// use catalog_softmax::temperature::LearnedTemperature;
/// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Similarity};
/// # let queries = [1.0f32, 0.0, 0.0, 1.0];
/// # let items = [0.9f32, 0.1, 0.2, 1.0];
/// # let batch = Batch::in_batch(Embeddings::new(&queries[..], 2, 2), Embeddings::new(&items[..], 2, 2)).build()?;
/// let mut temperature = LearnedTemperature::clip();
/// for _step in 0..3 {
///     let loss = Loss::softmax(Similarity::Cosine, temperature.temperature());
///     let (_, gradients) = Cpu::new().value_and_grad(&batch, &loss)?;
///     let gradient = temperature.gradient(&gradients);
///     temperature.set_log_scale(temperature.log_scale() - 0.1 * gradient);
/// }
/// assert!(temperature.temperature() < 0.07, "positives are nearest: a sharper softmax is a smaller loss");
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LearnedTemperature {
    log_scale: f64,
    /// Of tau.
    range: RangeInclusive<f64>,
}

impl LearnedTemperature {
    /// Starts at `temperature` and stays in `range`, both as tau.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) where an end of the range is not finite and > 0, where the range is empty, or
    /// where `temperature` is outside of it.
    pub fn new(temperature: f64, range: RangeInclusive<f64>) -> Result<Self> {
        check_temperature("range.start", *range.start())?;
        check_temperature("range.end", *range.end())?;
        if range.is_empty() {
            return Err(value("range", format!("{range:?}"), "the lower end first"));
        }
        if !range.contains(&temperature) {
            return Err(value("temperature", temperature, format!("in its range, {range:?}")));
        }
        Ok(LearnedTemperature { log_scale: -temperature.ln(), range })
    }

    /// CLIP's settings: tau starts at 0.07 and stays between 0.01 and 1.
    pub fn clip() -> Self {
        LearnedTemperature { log_scale: -0.07f64.ln(), range: 0.01..=1.0 }
    }

    /// `tau = exp(−s)`, for [`Loss::softmax`](crate::Loss::softmax). It is in the range that
    /// [`new`](LearnedTemperature::new) was given, so `new` accepts it again.
    pub fn temperature(&self) -> f64 {
        // At an end of the range, the exponential of the logarithm may round to a neighbour.
        (-self.log_scale).exp().clamp(*self.range.start(), *self.range.end())
    }

    /// The parameter `s`, to be saved in a checkpoint. To restore it, call
    /// [`set_log_scale`](LearnedTemperature::set_log_scale) on a temperature with the same range; training then goes on
    /// bitwise as before.
    ///
    /// ```
    /// use catalog_softmax::temperature::LearnedTemperature;
    /// let mut trained = LearnedTemperature::clip();
    /// trained.set_log_scale(3.21);
    /// let saved = trained.log_scale();
    ///
    /// let mut restored = LearnedTemperature::clip();
    /// restored.set_log_scale(saved);
    /// assert_eq!(restored, trained);
    /// ```
    pub fn log_scale(&self) -> f64 {
        self.log_scale
    }

    /// Sets `s` to the optimiser's new value, clamped to the range. A NaN stays NaN, and the loss then rejects the
    /// temperature.
    pub fn set_log_scale(&mut self, log_scale: f64) {
        self.log_scale = log_scale.clamp(-self.range.end().ln(), -self.range.start().ln());
    }

    /// `∂total/∂s = −tau ∂total/∂tau`, from a step's gradients.
    pub fn gradient<T>(&self, gradients: &Gradients<T>) -> f64 {
        -gradients.d_log_temperature
    }
}

fn check_temperature(argument: &str, temperature: f64) -> Result<()> {
    if temperature > 0.0 && temperature.is_finite() {
        return Ok(());
    }
    Err(value(argument, temperature, "a temperature, finite and > 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_their_closed_forms() {
        let all = [TemperatureSchedule::linear, TemperatureSchedule::cosine, TemperatureSchedule::exponential];
        // Quarters: cos(π/4) = √½, and (1/4)^(1/4) = √½.
        let half = 0.5f64.sqrt();
        let quarters = [[0.1625, 0.125, 0.0875], [0.2 - 0.075 * (1.0 - half), 0.125, 0.2 - 0.075 * (1.0 + half)]];
        let quarters = [quarters[0], quarters[1], [0.2 * half, 0.1, 0.1 * half]];
        for (schedule, wanted) in all.into_iter().zip(quarters) {
            for (from, to) in [(0.2, 0.05), (0.05, 0.2)] {
                let schedule = schedule(from, to).expect("temperatures");
                assert_eq!((schedule.at(0, 8), schedule.at(8, 8), schedule.at(9, 8)), (from, to, to));
                assert_eq!((schedule.at_progress(-1.0), schedule.at_progress(2.0)), (from, to));
                assert_eq!(schedule.at(0, 0), to);
                for (quarter, &wanted) in wanted.iter().enumerate() {
                    // Backwards they are the same read from the other end.
                    let step = if from > to { 2 * (quarter as u64 + 1) } else { 8 - 2 * (quarter as u64 + 1) };
                    let found = schedule.at(step, 8);
                    assert!((found - wanted).abs() < 1e-15, "{schedule:?} at {step}: {found}, not {wanted}");
                }
            }
        }
        for (from, to) in [(1e-300, 1e300), (1e300, 1e-300)] {
            let schedule = TemperatureSchedule::exponential(from, to).expect("temperatures");
            assert!((schedule.at_progress(0.5) - 1.0).abs() < 1e-12);
            assert_eq!((schedule.at(0, 8), schedule.at(8, 8)), (from, to));
            let (found, wanted) = (schedule.at(2, 8), from.sqrt());
            assert!((found / wanted - 1.0).abs() < 1e-12, "{found}, not {wanted}");
        }
        let constant = TemperatureSchedule::constant(0.07).expect("a temperature");
        assert!((0..20).all(|step| constant.at(step, 10) == 0.07));
    }

    #[test]
    fn a_learned_temperature_stays_in_its_range_and_comes_back() {
        let mut learned = LearnedTemperature::new(0.1, 0.02..=0.5).expect("a range");
        assert!((learned.temperature() - 0.1).abs() < 1e-16);
        learned.set_log_scale(100.0);
        assert!((learned.temperature() - 0.02).abs() < 1e-16);
        // Nothing of the excess is kept.
        learned.set_log_scale(learned.log_scale() - 0.5);
        assert!((learned.temperature() - 0.02 * 0.5f64.exp()).abs() < 1e-15);
        learned.set_log_scale(-100.0);
        assert!((learned.temperature() - 0.5).abs() < 1e-15);
        learned.set_log_scale(f64::NAN);
        assert!(learned.temperature().is_nan());
        let clip = LearnedTemperature::clip();
        let s = clip.log_scale();
        assert!((s - (1.0 / 0.07f64).ln()).abs() < 1e-15);
        assert_eq!(clip.range, 0.01..=1.0, "a scale of at most 100");
        let gradients = Gradients::<f32> { d_log_temperature: 3.0, ..Gradients::default() };
        assert_eq!(clip.gradient(&gradients), -3.0);
    }

    /// In thousands of ranges, of which the logarithms of many ends come back as their neighbours.
    #[test]
    fn an_end_of_the_range_is_in_it_and_can_be_given_back() {
        for i in 1..3000 {
            let (start, end) = (f64::from(i) * 1e-3, f64::from(i) * 1e-3 + 0.7);
            let mut learned = LearnedTemperature::new(0.5 * (start + end), start..=end).expect("a range");
            for (log_scale, wanted) in [(1e9, start), (-1e9, end)] {
                learned.set_log_scale(log_scale);
                assert!((learned.temperature() - wanted).abs() < 1e-15 * wanted.max(1.0));
                assert!((start..=end).contains(&learned.temperature()), "{} in {start}..={end}", learned.temperature());
                let again = LearnedTemperature::new(learned.temperature(), start..=end).expect("its own temperature");
                assert!((again.log_scale() - learned.log_scale()).abs() < 1e-15 * (1.0 + learned.log_scale().abs()));
                let mut restored = LearnedTemperature::new(end, start..=end).expect("a range");
                restored.set_log_scale(learned.log_scale());
                assert_eq!(restored, learned);
            }
        }
    }

    #[test]
    fn temperatures_out_of_range_are_errors() {
        let message = |error: crate::Error| error.to_string();
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let constant = message(TemperatureSchedule::constant(wrong).expect_err("no temperature"));
            assert!(constant.starts_with(&format!("temperature is {wrong}; rule: a temperature")), "{constant}");
            let from = message(TemperatureSchedule::linear(wrong, 0.1).expect_err("no temperature"));
            assert!(from.starts_with(&format!("from is {wrong}")), "{from}");
            let to = message(TemperatureSchedule::cosine(0.1, wrong).expect_err("no temperature"));
            assert!(to.starts_with(&format!("to is {wrong}")), "{to}");
            let start = message(LearnedTemperature::new(0.1, wrong..=1.0).expect_err("no temperature"));
            assert!(start.starts_with(&format!("range.start is {wrong}")), "{start}");
            let learned = message(LearnedTemperature::new(wrong, 0.01..=1.0).expect_err("no temperature"));
            assert_eq!(learned, format!("temperature is {wrong}; rule: in its range, 0.01..=1.0"));
        }
        let empty = message(LearnedTemperature::new(0.5, 1.0..=0.1).expect_err("empty"));
        assert!(empty.starts_with("range is 1.0..=0.1"), "{empty}");
    }
}
