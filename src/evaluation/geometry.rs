//! How embeddings lie on the unit sphere: alignment of positive pairs, and uniformity of all.

use crate::backend::Backend;
use crate::error::{Result, shape, value};
use crate::problem::batch::Batch;
use crate::problem::embeddings::Embeddings;
use crate::problem::loss::{Loss, Similarity};
use crate::problem::statistics::Request;

/// Mean distance of positive pairs on the unit sphere, `E |x̂ − ŷ|^alpha`: 0 if the two rows of each pair are one
/// point.
///
/// Row i of `x` (B, D) and of `y` (B, D) are a pair, such as a query and its positive. Wang and Isola, "Understanding
/// Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere", ICML 2020, equation 1; they
/// use alpha = 2. A row shorter than 1e-12 has cosine 0 with everything, as under [`Similarity::Cosine`]; one that is not finite
/// makes the result NaN. In float64.
///
/// # Errors
/// Shapes of `x` and `y` that are empty or disagree, and alpha that is not finite and > 0.
///
/// ```
/// use catalog_softmax::evaluation::alignment;
/// use catalog_softmax::Embeddings;
/// let (x, y) = ([1.0f32, 0.0, 0.0, 2.0], [3.0f32, 0.0, 1.0, 0.0]);
/// // One pair at a distance of 0, one at a right angle: |x̂ − ŷ|² = 2.
/// assert_eq!(alignment(Embeddings::new(&x[..], 2, 2), Embeddings::new(&y[..], 2, 2), 2.0)?, 1.0);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
pub fn alignment(x: Embeddings<'_>, y: Embeddings<'_>, alpha: f64) -> Result<f64> {
    x.check("x")?;
    y.check("y")?;
    if (x.rows(), x.dim()) != (y.rows(), y.dim()) {
        let rule = format!("shape ({}, {}), as x", x.rows(), x.dim());
        return Err(shape("y", format!("shape ({}, {})", y.rows(), y.dim()), rule));
    }
    check_positive("alpha", alpha)?;
    let (mut a, mut b) = (vec![0.0; x.dim()], vec![0.0; x.dim()]);
    let mut sum = 0.0;
    for row in 0..x.rows() {
        let norms = [unit_row(x, row, &mut a), unit_row(y, row, &mut b)];
        // A row that is not finite is NaN at unit length: it spoils the mean, whatever the other row is.
        let at_a_right_angle =
            norms.iter().all(|norm| norm.is_finite()) && norms.iter().any(|&norm| norm < Similarity::MIN_NORM);
        // Not 2 − 2 cos, which loses the distance of near pairs.
        let squared =
            if at_a_right_angle { 2.0 } else { a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() };
        sum += squared.powf(0.5 * alpha);
    }
    Ok(sum / x.rows() as f64)
}

/// How evenly embeddings cover the unit sphere, `log E exp(−t |x̂ − ŷ|²)` over pairs of different rows: lower is more
/// even, and 0 means that all rows are one point.
///
/// Wang and Isola, ICML 2020, equation 2; they use t = 2. Since `|x̂ − ŷ|² = 2 − 2 cos`, the sum over pairs is the
/// log-sum-exp of cosines under the temperature `1 / 2t`. Each row is its own positive, so it is not its own negative:
///
/// ```text
/// uniformity = −2t + log Σ_i exp(lse_i) − log B(B − 1)
/// ```
///
/// The backend's stream computes this in its own precision, without a B x B matrix. It costs as much as the value of a
/// loss with B queries and B candidates; for a whole catalogue, take a sample of its rows. A row shorter than 1e-12 has
/// cosine 0 with everything; one that is not finite makes the result NaN.
///
/// # Errors
/// Fewer than two rows; t that is not finite and > 0, or so small or large that `1 / 2t` is not a valid temperature; as
/// [`Backend::compute`].
///
/// ```
/// use catalog_softmax::evaluation::uniformity;
/// use catalog_softmax::{Cpu, Embeddings};
/// // Two opposite points: |x̂ − ŷ|² = 4.
/// let x = [1.0f32, 0.0, -2.0, 0.0];
/// assert!((uniformity(&mut Cpu::new(), Embeddings::new(&x[..], 2, 2), 2.0)? + 8.0).abs() < 1e-5);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
pub fn uniformity<B: Backend + ?Sized>(backend: &mut B, x: Embeddings<'_>, t: f64) -> Result<f64> {
    x.check("x")?;
    check_positive("t", t)?;
    if x.rows() < 2 {
        let rule = "rows >= 2: uniformity is a mean over pairs of different rows";
        return Err(shape("x", format!("shape ({}, {})", x.rows(), x.dim()), rule));
    }
    let batch = Batch::in_batch(x, x).build()?;
    let loss = Loss::softmax(Similarity::Cosine, 0.5 / t);
    // Only the temperature of this loss can be wrong, and the caller gave `t` instead.
    loss.check(&batch)
        .map_err(|_| value("t", t, "finite and > 0, with 2 log2(e) t a normal number of single precision"))?;
    let statistics = backend.statistics(&batch, &loss, Request::value())?;
    let pairs = x.rows() as f64 * (x.rows() - 1) as f64;
    Ok(log_sum_exp(&statistics.lse) - 2.0 * t - pairs.ln())
}

fn log_sum_exp(values: &[f64]) -> f64 {
    // `max` would drop a NaN: the sum keeps it.
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + values.iter().map(|value| (value - max).exp()).sum::<f64>().ln()
}

/// Row `row` at unit length. Returns the length that it had.
fn unit_row(x: Embeddings<'_>, row: usize, out: &mut [f64]) -> f64 {
    x.widen_row(row, out);
    let norm = out.iter().map(|x| x * x).sum::<f64>().sqrt();
    out.iter_mut().for_each(|x| *x /= norm);
    norm
}

fn check_positive(argument: &str, found: f64) -> Result<()> {
    if found > 0.0 && found.is_finite() { Ok(()) } else { Err(value(argument, found, "finite and > 0")) }
}
