//! Alignment and uniformity against closed forms and against all pairs in float64.

use catalog_softmax::evaluation::{alignment, uniformity};
use catalog_softmax::{Backend, Cpu, DType, Embeddings, Reference};
use catalog_softmax_testing::generate::{rng, rows};
use catalog_softmax_testing::problem::Storage;

/// Rows at unit length, in float64.
fn units(x: &Storage, dim: usize) -> Vec<Vec<f64>> {
    let values: Vec<f64> = x.to_f32().iter().map(|&v| f64::from(v)).collect();
    let unit = |row: &[f64]| {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter().map(|x| x / norm).collect()
    };
    values.chunks(dim).map(unit).collect()
}

fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

fn all_pairs(x: &[Vec<f64>], t: f64) -> f64 {
    let mut sum = 0.0;
    for i in 0..x.len() {
        for j in (0..x.len()).filter(|&j| j != i) {
            sum += (-t * squared_distance(&x[i], &x[j])).exp();
        }
    }
    (sum / (x.len() * (x.len() - 1)) as f64).ln()
}

#[test]
fn they_are_their_definitions_over_all_pairs() {
    for (seed, (b, dim)) in [(2, 1), (3, 7), (130, 16), (700, 33)].into_iter().enumerate() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let mut rng = rng(seed as u64);
            let x = Storage::new(&rows(&mut rng, b, dim, 1.0), dtype);
            let y = Storage::new(&rows(&mut rng, b, dim, 1.0), dtype);
            let (unit_x, unit_y) = (units(&x, dim), units(&y, dim));
            for alpha in [0.5, 1.0, 2.0, 3.0] {
                let distances = unit_x.iter().zip(&unit_y).map(|(x, y)| squared_distance(x, y).sqrt().powf(alpha));
                let wanted = distances.sum::<f64>() / b as f64;
                let found = alignment(x.view(dim), y.view(dim), alpha).expect("shapes that fit");
                assert!((found - wanted).abs() < 1e-13 * wanted.max(1.0), "{found}, not {wanted}, at alpha {alpha}");
            }
            for t in [0.1, 2.0, 20.0] {
                let wanted = all_pairs(&unit_x, t);
                let check = |name: &str, found: f64, tolerance: f64| {
                    let off = (found - wanted).abs();
                    assert!(off < tolerance, "{name}: {found}, not {wanted}, for B {b}, D {dim}, t {t}, {dtype:?}");
                };
                let reference = uniformity(&mut Reference::new(), x.view(dim), t).expect("a temperature");
                check("reference", reference, 1e-12 * (1.0 + t));
                // A cosine is off by D/2 roundings of f32 at most, some √D of them in the mean, and is multiplied by 2t.
                let cpu = uniformity(&mut Cpu::new(), x.view(dim), t).expect("a temperature");
                check("cpu", cpu, f64::from(f32::EPSILON) * (4.0 + dim as f64) * (1.0 + 2.0 * t));
            }
        }
    }
}

#[test]
fn closed_forms() {
    let mut cpu = Cpu::new();
    // The corners of a simplex in 3 dimensions have cosine −1/3: |x − y|² = 8/3.
    let simplex = [1.0f32, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0];
    let simplex = Embeddings::new(&simplex[..], 4, 3);
    let found = uniformity(&mut cpu, simplex, 2.0).expect("fits");
    assert!((found + 16.0 / 3.0).abs() < 1e-5, "{found}");
    // One point, at any length; and pairs of it with itself.
    let point = [1.0f32, 2.0, 0.5, 1.0, 4.0, 8.0];
    let point = Embeddings::new(&point[..], 3, 2);
    assert!(uniformity(&mut cpu, point, 3.0).expect("fits").abs() < 1e-5);
    assert!(alignment(point, point, 2.0).expect("fits").abs() < 1e-30);
    // Opposite points: distance 2.
    let (x, y) = ([3.0f32, 4.0], [-6.0f32, -8.0]);
    let found = alignment(Embeddings::new(&x[..], 1, 2), Embeddings::new(&y[..], 1, 2), 3.0).expect("fits");
    assert!((found - 8.0).abs() < 1e-12, "{found}");
    // Near pairs keep their distance: an angle of 1e-5 in f32, whose square 2 − 2 cos would lose.
    let (x, y) = ([1.0f32, 0.0], [1.0f32, 1e-5]);
    let found = alignment(Embeddings::new(&x[..], 1, 2), Embeddings::new(&y[..], 1, 2), 1.0).expect("fits");
    assert!((found - 1e-5).abs() < 1e-12, "{found}");
    // A row of no length is at a right angle to all.
    let (zero, x) = ([0.0f32, 0.0, 1.0, 0.0], [1.0f32, 0.0, 1.0, 0.0]);
    let (zero, x) = (Embeddings::new(&zero[..], 2, 2), Embeddings::new(&x[..], 2, 2));
    assert_eq!(alignment(zero, x, 2.0).expect("fits"), 1.0);
    assert!((uniformity(&mut cpu, zero, 2.0).expect("fits") + 4.0).abs() < 1e-5);
    // What is not finite shows.
    let spoiled = [f32::NAN, 0.0, 1.0, 0.0];
    let spoiled = Embeddings::new(&spoiled[..], 2, 2);
    assert!(alignment(spoiled, x, 2.0).expect("fits").is_nan());
    assert!(uniformity(&mut cpu, spoiled, 2.0).expect("fits").is_nan());
    // Beside a row of no length, too.
    let none = [0.0f32, 0.0];
    for spoiled in [[f32::NAN, 1.0], [1.0, f32::INFINITY], [f32::NEG_INFINITY, 0.0]] {
        let (spoiled, none) = (Embeddings::new(&spoiled[..], 1, 2), Embeddings::new(&none[..], 1, 2));
        assert!(alignment(spoiled, none, 2.0).expect("fits").is_nan());
        assert!(alignment(none, spoiled, 2.0).expect("fits").is_nan());
    }
}

#[test]
fn bad_input_is_an_error() {
    let x = [1.0f32, 0.0, 0.0, 1.0];
    let (two, one) = (Embeddings::new(&x[..], 2, 2), Embeddings::new(&x[..2], 1, 2));
    let boxed: &mut dyn Backend<Real = f32> = &mut Cpu::new();
    for (result, message) in [
        (alignment(two, one, 2.0), "y has shape (1, 2); rule: shape (2, 2), as x"),
        (alignment(two, Embeddings::new(&x[..], 4, 1), 2.0), "y has shape (4, 1)"),
        (alignment(Embeddings::new(&x[..3], 2, 2), two, 2.0), "x has 3 elements"),
        (alignment(two, two, 0.0), "alpha is 0; rule: finite and > 0"),
        (alignment(two, two, f64::NAN), "alpha is NaN"),
        (uniformity(boxed, two, 0.0), "t is 0; rule: finite and > 0"),
        (uniformity(boxed, two, f64::INFINITY), "t is inf"),
        (uniformity(boxed, two, 1e300), "t is 1e300; rule: "),
        (uniformity(boxed, two, 1e-300), "t is 1e-300; rule: "),
        (uniformity(boxed, one, 2.0), "x has shape (1, 2); rule: rows >= 2"),
        (uniformity(boxed, Embeddings::new(&x[..0], 0, 2), 2.0), "x has shape (0, 2)"),
    ] {
        let error = result.expect_err(message).to_string();
        assert!(error.starts_with(message), "{error}, not {message}");
    }
}
