//! The optimiser against its formulas in float64, and what it promises beside them.

use catalog_softmax::half::{bf16, f16};
use catalog_softmax::optimizer::{Optimizer, TableMut};
use catalog_softmax::{DType, Matrix, Result};
use catalog_softmax_testing::forge;
use catalog_softmax_testing::problem::Storage;

fn table(values: &mut Storage, dim: usize, padding: usize) -> TableMut<'_> {
    let stride = dim + padding;
    let rows = values.len() / stride;
    let table = match values {
        Storage::F32(v) => TableMut::new(v, rows, dim),
        Storage::F16(v) => TableMut::new(v, rows, dim),
        Storage::Bf16(v) => TableMut::new(v, rows, dim),
    };
    table.with_stride(stride)
}

/// All bits: −0 is not 0.
fn bits(values: &Storage) -> Vec<u32> {
    match values {
        Storage::F32(v) => v.iter().map(|x| x.to_bits()).collect(),
        Storage::F16(v) => v.iter().map(|x| u32::from(x.to_bits())).collect(),
        Storage::Bf16(v) => v.iter().map(|x| u32::from(x.to_bits())).collect(),
    }
}

/// Numbers without structure, of size 1.
fn random(len: usize, seed: u64) -> Vec<f32> {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

/// Gradients whose rows differ in size, by factors of up to 10^6.
fn gradient(rows: usize, dim: usize, seed: u64) -> Matrix<f32> {
    let mut values = random(rows * dim, seed);
    for (row, values) in values.chunks_mut(dim).enumerate() {
        let size = 10f32.powi((row % 7) as i32 - 4);
        values.iter_mut().for_each(|g| *g *= size);
    }
    Matrix { values, rows, dim }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Rule {
    Sgd,
    RowAdagrad,
    Adam,
}

const RULES: [Rule; 3] = [Rule::Sgd, Rule::RowAdagrad, Rule::Adam];

/// Options that make every part of a formula count.
#[derive(Debug, Clone, Copy)]
struct Options {
    rule: Rule,
    learning_rate: f64,
    decay: f64,
    eps: f64,
    betas: [f64; 2],
    initial: f64,
}

impl Options {
    fn optimizer(&self, rows: usize, dim: usize) -> Optimizer {
        let make = || -> Result<Optimizer> {
            let optimizer = match self.rule {
                Rule::Sgd => Optimizer::sgd(self.learning_rate)?,
                Rule::RowAdagrad => Optimizer::row_adagrad(rows, self.learning_rate)?
                    .with_eps(self.eps)?
                    .with_initial_accumulator(self.initial as f32)?,
                Rule::Adam => Optimizer::adam(rows, dim, self.learning_rate)?
                    .with_eps(self.eps)?
                    .with_betas(self.betas[0], self.betas[1])?,
            };
            optimizer.with_weight_decay(self.decay)
        };
        make().expect("valid options")
    }
}

fn simple(rule: Rule) -> Options {
    Options { rule, learning_rate: 0.1, decay: 0.0, eps: 1e-8, betas: [0.9, 0.999], initial: 0.0 }
}

/// The formulas with plain loops in float64. `round` is applied to every result: with the rounding to f32 this is an
/// honest f32 computation, since float64 has more than twice its digits.
///
/// They are those of PyTorch 2:
///
/// ```text
/// SGD          param.add_(grad, alpha=-lr)
/// AdamW        param.mul_(1 - lr * weight_decay)
///              exp_avg.lerp_(grad, 1 - beta1);  exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
///              denom = (exp_avg_sq.sqrt() / (1 - beta2 ** step) ** 0.5).add_(eps)
///              param.addcdiv_(exp_avg, denom, value=-lr / (1 - beta1 ** step))
/// SparseAdam   the same on the rows of the gradient alone, but for eps, which it adds before the correction:
///              denom = exp_avg_sq.sqrt().add_(eps);  value=-lr * sqrt(1 - beta2 ** step) / (1 - beta1 ** step)
/// Adagrad      state_sum.addcmul_(grad, grad, value=1);  param.addcdiv_(grad, state_sum.sqrt().add_(eps), value=-lr)
/// ```
///
/// Row-wise Adagrad (`rwsadagrad.py` of DLRM) is Adagrad with `grad.pow(2).mean(dim=1)` in place of the square, so rows
/// of one element are stepped alike by both.
struct Plain {
    options: Options,
    round: fn(f64) -> f64,
    dim: usize,
    w: Vec<f64>,
    sums: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    steps: i32,
    /// |w| at the start and all changes of it: what rounding errors are proportional to.
    path: Vec<f64>,
}

impl Plain {
    fn new(options: Options, round: fn(f64) -> f64, start: &[f32], dim: usize) -> Plain {
        let w: Vec<f64> = start.iter().map(|&w| f64::from(w)).collect();
        let zeros = vec![0.0; w.len()];
        let sums = vec![options.initial; w.len() / dim];
        let path = w.iter().map(|w| w.abs()).collect();
        Plain { options, round, dim, w, sums, m: zeros.clone(), v: zeros, steps: 0, path }
    }

    fn step(&mut self, rows: &[u32], gradient: &Matrix<f32>) {
        let Options { rule, learning_rate: lr, decay, eps, betas: [beta1, beta2], .. } = self.options;
        let (r, dim) = (self.round, self.dim);
        self.steps += 1;
        for (place, &row) in rows.iter().enumerate() {
            let g: Vec<f64> = gradient.row(place).iter().map(|&g| f64::from(g)).collect();
            let mean = r(g.iter().fold(0.0, |sum, g| r(sum + r(g * g))) / dim as f64);
            let sum = &mut self.sums[row as usize];
            *sum = r(*sum + mean);
            for (k, &g) in g.iter().enumerate() {
                let i = row as usize * dim + k;
                let (m, v) = (&mut self.m[i], &mut self.v[i]);
                let change = match rule {
                    Rule::Sgd => r(lr * g),
                    Rule::RowAdagrad => r(r(r(lr) * g) / r(r(sum.sqrt()) + r(eps))),
                    Rule::Adam => {
                        *m = r(r(r(beta1) * *m) + r(r(1.0 - beta1) * g));
                        *v = r(r(r(beta2) * *v) + r(r(1.0 - beta2) * r(g * g)));
                        let m_hat = r(*m / r(1.0 - beta1.powi(self.steps)));
                        let v_hat = r(*v / r(1.0 - beta2.powi(self.steps)));
                        r(r(r(lr) * m_hat) / r(r(v_hat.sqrt()) + r(eps)))
                    }
                };
                let before = self.w[i];
                self.w[i] = r(r(r(1.0 - lr * decay) * before) - change);
                self.path[i] += change.abs() + (lr * decay * before).abs();
            }
        }
    }
}

fn to_f32(x: f64) -> f64 {
    f64::from(x as f32)
}

fn all_options() -> Vec<Options> {
    let mut all = Vec::new();
    for rule in RULES {
        all.push(simple(rule));
        all.push(Options { decay: 0.3, eps: 0.1, betas: [0.5, 0.9], initial: 0.7, ..simple(rule) });
    }
    all.push(Options { betas: [0.0, 0.0], ..simple(Rule::Adam) });
    all
}

/// Rows of a step that names some of them: about a third, others in each step.
fn some_rows(rows: usize, step: u64) -> Vec<u32> {
    (0..rows as u32).filter(|row| (u64::from(*row) + step).is_multiple_of(3)).collect()
}

/// Compares with float64, element by element, to four times the error that the honest f32 computation makes.
#[test]
fn steps_are_the_formulas() {
    const STEPS: u64 = 40;
    // A row's mean has lanes, and rows are shared among tasks by their elements.
    for (rows, dim) in [(1, 1), (5, 1), (30, 7), (29, 8), (31, 9), (600, 65)] {
        let start = random(rows * dim, 1);
        for (options, sparse) in all_options().into_iter().flat_map(|options| [(options, false), (options, true)]) {
            let mut values = start.clone();
            let mut optimizer = options.optimizer(rows, dim);
            let mut exact = Plain::new(options, |x| x, &start, dim);
            let mut baseline = Plain::new(options, to_f32, &start, dim);
            for step in 0..STEPS {
                let named = if sparse { some_rows(rows, step) } else { (0..rows as u32).collect() };
                let gradient = gradient(named.len(), dim, 100 + step);
                let mut table = TableMut::new(&mut values, rows, dim);
                let stepped = match sparse {
                    true => optimizer.step_rows(&mut table, &named, &gradient),
                    false => optimizer.step(&mut table, &gradient),
                };
                stepped.expect("shapes that fit");
                exact.step(&named, &gradient);
                baseline.step(&named, &gradient);
            }
            let error = |w: f64, i: usize| (w - exact.w[i]).abs() / exact.path[i];
            let lost = baseline.w.iter().enumerate().map(|(i, &w)| error(w, i)).fold(0.0, f64::max);
            // A baseline of few elements may be lucky, and one that breaks down excuses nothing.
            let epsilon = f64::from(f32::EPSILON);
            let tolerance = 4.0 * lost.clamp(0.5 * epsilon, STEPS as f64 * epsilon);
            for (i, &w) in values.iter().enumerate() {
                let error = error(f64::from(w), i);
                assert!(error <= tolerance, "{options:?}, sparse {sparse}, ({rows}, {dim}): {i} is {error:e} off");
            }
            check_state(&optimizer, &exact, &baseline);
        }
    }
}

/// The state is the formulas', to four times the baseline's error relative to the largest in the tensor's element
/// itself.
fn check_state(optimizer: &Optimizer, exact: &Plain, baseline: &Plain) {
    let [m, v] = optimizer.moments().unwrap_or([&[]; 2]);
    let adagrad = optimizer.accumulator().unwrap_or(&[]);
    let tensors = [(adagrad, &exact.sums, &baseline.sums), (m, &exact.m, &baseline.m), (v, &exact.v, &baseline.v)];
    for (found, exact, baseline) in tensors {
        // m is a sum of terms of both signs: its errors are those of its largest terms.
        let scale = exact.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
        let lost = exact.iter().zip(baseline).map(|(x, b)| (x - b).abs() / scale).fold(0.0, f64::max);
        let tolerance = 4.0 * lost.max(0.5 * f64::from(f32::EPSILON));
        for (i, (&found, exact)) in found.iter().zip(exact).enumerate() {
            let error = (f64::from(found) - exact).abs() / scale;
            assert!(error <= tolerance, "element {i} of the state: {found:e}, not {exact:e}");
        }
    }
}

/// Worked out by hand: one step of each rule.
#[test]
fn first_steps_are_known_numbers() {
    let step = |optimizer: Result<Optimizer>| {
        let mut values = [1.0f32, 2.0];
        let gradient = Matrix { values: vec![3.0, -4.0], rows: 1, dim: 2 };
        let mut optimizer = optimizer.expect("valid options");
        optimizer.step(&mut TableMut::new(&mut values, 1, 2), &gradient).expect("shapes that fit");
        values
    };
    let near = |found: [f32; 2], wanted: [f64; 2]| {
        for (found, wanted) in found.into_iter().zip(wanted) {
            assert!((f64::from(found) - wanted).abs() < 4.0 * f64::from(f32::EPSILON), "{found}, not {wanted}");
        }
    };
    near(step(Optimizer::sgd(0.5)), [-0.5, 4.0]);
    near(step(Optimizer::sgd(0.5).and_then(|sgd| sgd.with_weight_decay(0.5))), [0.75 - 1.5, 1.5 + 2.0]);
    // The mean square is 12.5.
    let root = 12.5f64.sqrt();
    near(step(Optimizer::row_adagrad(1, 0.5)), [1.0 - 1.5 / root, 2.0 + 2.0 / root]);
    // Both moments are corrected to the gradient's own: every element moves by the rate.
    near(step(Optimizer::adam(1, 2, 0.5)), [0.5, 2.5]);
}

#[test]
fn threads_and_strides_do_not_matter() {
    let (rows, dim) = (900, 50);
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for (rule, master) in RULES.into_iter().flat_map(|rule| [(rule, false), (rule, true)]) {
            if master && dtype == DType::F32 {
                continue;
            }
            let run = |threads: usize, padding: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
                pool.install(|| {
                    let start = Storage::new(&random(rows * dim, 5), dtype);
                    let mut values = start.padded(dim, padding);
                    let mut optimizer = simple(rule).optimizer(rows, dim).with_rounding_seed(9);
                    if master {
                        optimizer = optimizer.with_master_copy(start.view(dim)).expect("its shape");
                    }
                    for step in 0..4 {
                        let mut table = table(&mut values, dim, padding);
                        let named = if step % 2 == 0 { (0..rows as u32).collect() } else { some_rows(rows, step) };
                        let gradient = gradient(named.len(), dim, step);
                        optimizer.step_rows(&mut table, &named, &gradient).expect("shapes that fit");
                    }
                    let rows: Vec<u32> =
                        bits(&values).chunks(dim + padding).flat_map(|row| row[..dim].to_vec()).collect();
                    (rows, optimizer.to_bytes())
                })
            };
            let one = run(1, 0);
            for (threads, padding) in [(2, 0), (3, 0), (7, 0), (1, 3), (3, 5)] {
                assert!(run(threads, padding) == one, "{rule:?} in {dtype:?} on {threads} threads, {padding} between");
            }
        }
    }
}

/// Bitwise, in every type: rows are stepped alike whether they are named or not, and those that are not named stay.
#[test]
fn a_row_sparse_step_is_the_dense_one_on_its_rows() {
    let (rows, dim) = (300, 70);
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for options in all_options() {
            let start = Storage::new(&random(rows * dim, 2), dtype);
            let (mut dense, mut sparse) = (start.clone(), start.clone());
            let mut optimizers = [options.optimizer(rows, dim), options.optimizer(rows, dim)];
            // One step on all rows, so that there is a state.
            for (optimizer, values) in optimizers.iter_mut().zip([&mut dense, &mut sparse]) {
                optimizer.step(&mut table(values, dim, 0), &gradient(rows, dim, 3)).expect("shapes that fit");
            }
            let before = (bits(&sparse), optimizers[1].clone());
            let (named, all) = (some_rows(rows, 0), gradient(rows, dim, 4));
            let picked: Vec<f32> = named.iter().flat_map(|&row| all.row(row as usize).to_vec()).collect();
            let picked = Matrix { values: picked, rows: named.len(), dim };
            optimizers[0].step(&mut table(&mut dense, dim, 0), &all).expect("shapes that fit");
            optimizers[1].step_rows(&mut table(&mut sparse, dim, 0), &named, &picked).expect("shapes that fit");
            let state = |optimizer: &Optimizer, row: usize| -> Vec<u32> {
                let elements = row * dim..(row + 1) * dim;
                let sum = optimizer.accumulator().map(|sums| sums[row]);
                let moments = optimizer.moments().map(|moments| moments.map(|m| m[elements.clone()].to_vec()));
                sum.into_iter().chain(moments.into_iter().flatten().flatten()).map(f32::to_bits).collect()
            };
            let (dense, sparse) = (bits(&dense), bits(&sparse));
            for row in 0..rows {
                let elements = row * dim..(row + 1) * dim;
                let is_named = named.contains(&(row as u32));
                let wanted = if is_named { &dense } else { &before.0 };
                assert_eq!(sparse[elements.clone()], wanted[elements], "row {row}: {options:?} in {dtype:?}");
                let wanted = if is_named { &optimizers[0] } else { &before.1 };
                assert_eq!(state(&optimizers[1], row), state(wanted, row), "state of row {row}: {options:?}");
            }
        }
    }
}

#[test]
fn a_step_on_no_rows_is_counted_and_changes_nothing() {
    let mut values = vec![1.0f32; 6];
    let mut adam = Optimizer::adam(3, 2, 0.1).expect("valid options");
    let none = Matrix { values: vec![], rows: 0, dim: 2 };
    adam.step_rows(&mut TableMut::new(&mut values, 3, 2), &[], &none).expect("shapes that fit");
    assert_eq!((adam.steps(), values), (1, vec![1.0; 6]));
}

#[test]
fn a_master_copy_is_stepped_as_an_f32_table_and_the_table_is_its_rounding() {
    let (rows, dim) = (40, 70);
    for dtype in [DType::F16, DType::Bf16] {
        for options in all_options() {
            // Of the f32 embeddings that the table is the rounding of.
            let start = Storage::new(&random(rows * dim, 6), DType::F32);
            let (mut wide, mut narrow) = (start.clone(), Storage::new(&start.to_f32(), dtype));
            let mut plain = options.optimizer(rows, dim);
            let mut master = options.optimizer(rows, dim).with_master_copy(start.view(dim)).expect("its shape");
            for step in 0..20 {
                let named = some_rows(rows, step);
                let gradient = gradient(named.len(), dim, step);
                plain.step_rows(&mut table(&mut wide, dim, 0), &named, &gradient).expect("shapes that fit");
                master.step_rows(&mut table(&mut narrow, dim, 0), &named, &gradient).expect("shapes that fit");
            }
            let copy = master.master_copy().expect("it was given");
            assert_eq!(bits(&Storage::F32(copy.values.clone())), bits(&wide));
            assert_eq!(bits(&narrow), bits(&Storage::new(&copy.values, dtype)));
        }
    }
}

/// n elements of `start`, each after `steps` steps of SGD by `-change`.
fn drift(dtype: DType, start: f32, change: f32, steps: u64, seed: u64) -> Vec<f32> {
    let (rows, dim) = (250, 41);
    let mut values = Storage::new(&vec![start; rows * dim], dtype);
    let mut sgd = Optimizer::sgd(1.0).expect("a rate").with_rounding_seed(seed);
    let gradient = Matrix { values: vec![-change; rows * dim], rows, dim };
    for _ in 0..steps {
        sgd.step(&mut table(&mut values, dim, 0), &gradient).expect("shapes that fit");
    }
    values.to_f32()
}

/// The mean of n elements is within five standard errors. A step adds a variance of `p (1 − p) spacing²` with p the
/// part of a spacing by which the change is past a neighbour; over several steps the largest, `spacing²/4`, bounds
/// each.
#[test]
fn stochastic_rounding_is_unbiased() {
    let (f16_least, bf16_least) = (f32::exp2(-24.0), f32::exp2(-133.0));
    let cases = [
        (DType::Bf16, 1.0, 1.0 / 128.0),
        (DType::Bf16, -3.0, 1.0 / 64.0),
        (DType::Bf16, bf16_least, bf16_least),
        (DType::F16, 1.0, 1.0 / 1024.0),
        (DType::F16, -700.0, 0.5),
        (DType::F16, 10.0 * f16_least, f16_least),
        (DType::F16, 0.0, f16_least),
    ];
    for (dtype, start, spacing) in cases {
        for (part, steps) in [(0.5, 1), (0.1, 1), (-0.9, 1), (0.03, 1), (0.04, 100), (-0.01, 100)] {
            // Below 0 the spacing is the same; below a power of two, it may be half as large.
            let change = part * spacing;
            let drifted = drift(dtype, start, change, steps, 11);
            let n = drifted.len() as f64;
            // The change as it is in f32, after its addition.
            let exact = f64::from(start + change) - f64::from(start);
            let exact = if steps == 1 { exact } else { f64::from(change) * steps as f64 };
            let mean = drifted.iter().map(|&x| f64::from(x) - f64::from(start)).sum::<f64>() / n;
            let past = f64::from(part).abs();
            let variance = if steps == 1 { past * (1.0 - past) } else { steps as f64 / 4.0 };
            let error = 5.0 * (variance / n).sqrt() * f64::from(spacing);
            assert!(
                (mean - exact).abs() <= error,
                "{dtype:?} {start} by {part}, {steps} times: {mean:e}, not {exact:e}"
            );
            // To nearest, nothing would have moved.
            assert!(part.abs() >= 0.5 || Storage::new(&[start + change], dtype).to_f32()[0] == start || start == 0.0);
        }
    }
}

/// Half of the elements go up, and whether one does says nothing about the next column, row, step or seed.
#[test]
fn random_bits_are_independent() {
    let dim = 41;
    let up = |steps: u64, seed: u64| -> Vec<f64> {
        // Every element is in the middle of two neighbours before each rounding.
        let before =
            if steps == 1 { vec![1.0; 250 * dim] } else { drift(DType::Bf16, 1.0, 1.0 / 256.0, steps - 1, seed) };
        let after = drift(DType::Bf16, 1.0, 1.0 / 256.0, steps, seed);
        after.iter().zip(&before).map(|(after, before)| if after > before { 1.0 } else { -1.0 }).collect()
    };
    let first = up(1, 0);
    let n = first.len();
    let others = [
        ("itself", vec![1.0; n]),
        ("the next column", [&first[1..], &first[..1]].concat()),
        ("the column after that", [&first[2..], &first[..2]].concat()),
        ("the next row", [&first[dim..], &first[..dim]].concat()),
        ("the next step", up(2, 0)),
        ("the next seed", up(1, 1)),
    ];
    for (which, other) in others {
        let correlation = first.iter().zip(&other).map(|(a, b)| a * b).sum::<f64>() / n as f64;
        assert!(correlation.abs() <= 5.0 / (n as f64).sqrt(), "{which}: {correlation}");
    }
}

/// A gradient of 0 changes nothing, whatever number of its type an element is, infinities included.
#[test]
fn numbers_that_a_type_has_stay() {
    let f16s: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| !x.is_nan()).collect();
    let bf16s: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).filter(|x| !x.is_nan()).collect();
    for start in [Storage::F16(f16s), Storage::Bf16(bf16s)] {
        let n = start.len();
        for rule in RULES {
            let mut values = start.clone();
            let zeros = Matrix { values: vec![0.0; n], rows: 1, dim: n };
            let mut optimizer = simple(rule).optimizer(1, n);
            optimizer.step(&mut table(&mut values, n, 0), &zeros).expect("shapes that fit");
            assert!(bits(&values) == bits(&start), "{rule:?}");
        }
    }
}

#[test]
fn numbers_that_are_not_finite_stay_in_their_rows() {
    for (rule, spoil) in RULES.into_iter().flat_map(|rule| [(rule, f32::NAN), (rule, f32::INFINITY)]) {
        let (rows, dim) = (5, 3);
        let start = random(rows * dim, 8);
        let (mut spoiled, mut clean) = (start.clone(), start);
        let mut optimizers = [simple(rule).optimizer(rows, dim), simple(rule).optimizer(rows, dim)];
        for step in 0..3 {
            let mut gradient = gradient(rows, dim, step);
            optimizers[0].step(&mut TableMut::new(&mut clean, rows, dim), &gradient).expect("shapes that fit");
            if step == 0 {
                gradient.values[2 * dim + 1] = spoil;
            }
            optimizers[1].step(&mut TableMut::new(&mut spoiled, rows, dim), &gradient).expect("shapes that fit");
        }
        for row in (0..rows).filter(|&row| row != 2) {
            assert_eq!(spoiled[row * dim..][..dim], clean[row * dim..][..dim], "{rule:?}: row {row}");
        }
        assert!(!spoiled[2 * dim + 1].is_finite(), "{rule:?}");
        let beside = [spoiled[2 * dim], spoiled[2 * dim + 2]];
        match (rule, spoil.is_nan()) {
            (Rule::RowAdagrad, true) => assert!(beside.iter().all(|w| w.is_nan())),
            _ => assert!(beside.iter().all(|w| w.is_finite())),
        }
        // Such a state is saved, too.
        let bytes = optimizers[1].to_bytes();
        assert_eq!(Optimizer::from_bytes(&bytes).expect("a state as it was saved").to_bytes(), bytes);
    }
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("an error").to_string()
}

#[test]
fn bad_options_are_errors() {
    let adam = || Optimizer::adam(3, 2, 0.1).expect("valid options");
    let adagrad = || Optimizer::row_adagrad(3, 0.1).expect("valid options");
    let sgd = || Optimizer::sgd(0.1).expect("valid options");
    for wrong in [-0.1, f64::NAN, f64::INFINITY, 1e39] {
        let starts = |found: String, argument: &str| {
            assert!(
                found.starts_with(&format!("{argument} is ")) && found.ends_with("; rule: finite and >= 0, as an f32"),
                "{found}"
            );
        };
        starts(message(Optimizer::sgd(wrong)), "learning_rate");
        starts(message(Optimizer::row_adagrad(3, wrong)), "learning_rate");
        starts(message(Optimizer::adam(3, 2, wrong)), "learning_rate");
        starts(message(sgd().with_weight_decay(wrong)), "weight_decay");
        starts(message(adagrad().with_initial_accumulator(wrong as f32)), "initial_accumulator");
        let mut kept = sgd();
        starts(message(kept.set_learning_rate(wrong)), "learning_rate");
        assert_eq!(kept, sgd());
    }
    for wrong in [0.0, -1e-8, f64::NAN, f64::INFINITY, 1e-50, 1e39] {
        for optimizer in [adam(), adagrad()] {
            let found = message(optimizer.with_eps(wrong));
            assert!(found.starts_with("eps is ") && found.ends_with("; rule: finite and > 0, as an f32"), "{found}");
        }
    }
    for wrong in [1.0, -0.1, f64::NAN, 1.0 - 1e-12] {
        let found = [message(adam().with_betas(wrong, 0.9)), message(adam().with_betas(0.9, wrong))];
        assert!(found[0].starts_with("beta1 is ") && found[1].starts_with("beta2 is "), "{found:?}");
        assert!(found.iter().all(|found| found.ends_with("; rule: in [0, 1), as an f32")), "{found:?}");
    }
    assert!(message(sgd().with_eps(0.1)).starts_with("eps is given but does not apply"));
    assert!(message(adagrad().with_betas(0.1, 0.1)).starts_with("betas is given but does not apply"));
    assert!(
        message(adam().with_initial_accumulator(0.1)).starts_with("initial_accumulator is given but does not apply")
    );
    let mut stepped = adagrad();
    let gradient = Matrix { values: vec![1.0; 6], rows: 3, dim: 2 };
    stepped.step(&mut TableMut::new(&mut [0f32; 6], 3, 2), &gradient).expect("shapes that fit");
    assert!(
        message(stepped.with_initial_accumulator(0.1)).starts_with("initial_accumulator is given but does not apply")
    );
    let sizes = "rule: rows from 1 to 2^31 - 1 and dim >= 1";
    for found in [
        message(Optimizer::row_adagrad(0, 0.1)),
        message(Optimizer::row_adagrad(1 << 31, 0.1)),
        message(Optimizer::adam(0, 2, 0.1)),
        message(Optimizer::adam(3, 0, 0.1)),
        message(Optimizer::adam(1 << 31, 2, 0.1)),
    ] {
        assert!(found.starts_with("table has shape (") && found.ends_with(sizes), "{found}");
    }
    for dim in [usize::MAX, 1 << 40] {
        let found = message(Optimizer::adam(i32::MAX as usize, dim, 0.1));
        assert!(found.ends_with("rule: as much state as there is memory for"), "{found}");
    }
}

/// Each error, and that nothing has changed after it.
#[test]
fn bad_tables_and_gradients_are_errors() {
    let matrix = |rows: usize, dim: usize| Matrix { values: vec![1.0; rows * dim], rows, dim };
    let adam = Optimizer::adam(3, 2, 0.1).expect("valid options");
    let check = |optimizer: &Optimizer, rows: usize, dim: usize, gradient: &Matrix<f32>, wanted: &str| {
        let (mut changed, mut values) = (optimizer.clone(), vec![0.5f32; rows * dim]);
        let found = message(changed.step(&mut TableMut::new(&mut values, rows, dim), gradient));
        assert_eq!(found, wanted);
        let all: Vec<u32> = (0..gradient.rows as u32).collect();
        assert!(changed.step_rows(&mut TableMut::new(&mut values, rows, dim), &all, gradient).is_err(), "{wanted}");
        assert!(&changed == optimizer && values.iter().all(|&w| w == 0.5), "{wanted}");
    };
    check(&adam, 4, 2, &matrix(4, 2), "table has shape (4, 2); rule: shape (3, 2), that of the state");
    check(&adam, 3, 4, &matrix(3, 4), "table has shape (3, 4); rule: shape (3, 2), that of the state");
    let adagrad = Optimizer::row_adagrad(3, 0.1).expect("valid options");
    check(&adagrad, 4, 2, &matrix(4, 2), "table has shape (4, 2); rule: shape (3, 2), that of the state");
    let rule = "rule: shape (3, 2): the rows of the table, and its dim";
    check(&adam, 3, 2, &matrix(3, 1), &format!("gradient has shape (3, 1); {rule}"));
    let mut short = matrix(3, 2);
    short.values.pop();
    check(&adam, 3, 2, &short, "gradient has length 5; rule: length 6, rows times dim");
    let found = message(adam.clone().step(&mut TableMut::new(&mut [0f32; 6], 3, 2), &matrix(2, 2)));
    assert_eq!(found, format!("gradient has shape (2, 2); {rule}"));
    // Shapes that elements do not fill.
    let (sgd, mut values) = (Optimizer::sgd(0.1).expect("a rate"), vec![0f32; 6]);
    let step = |mut table: TableMut<'_>| {
        let gradient = matrix(table.rows(), table.dim());
        message(sgd.clone().step(&mut table, &gradient))
    };
    assert!(step(TableMut::new(&mut values, 3, 3)).starts_with("table has 6 elements"));
    assert!(step(TableMut::new(&mut values, 3, 2).with_stride(1)).starts_with("table has a row stride of 1"));
    assert!(step(TableMut::new(&mut values, 3, 2).with_stride(3)).starts_with("table has 6 elements"));
    assert!(step(TableMut::new(&mut values, 0, 2)).starts_with("table has shape (0, 2)"));
    assert!(step(TableMut::new(&mut values, 1 << 31, 0)).starts_with("table has 2147483648 rows"));
    // Rows.
    let rows = |rows: &[u32]| {
        let mut changed = adam.clone();
        let mut values = [0.5f32; 6];
        let found = message(changed.step_rows(&mut TableMut::new(&mut values, 3, 2), rows, &matrix(rows.len(), 2)));
        assert!(changed == adam && values == [0.5; 6]);
        found
    };
    assert_eq!(rows(&[0, 2, 2]), "rows[2] is 2; rule: above the one before, 2");
    assert_eq!(rows(&[2, 0]), "rows[1] is 0; rule: above the one before, 2");
    assert_eq!(rows(&[1, 3, 4]), "rows[1] is 3; rule: below the number of rows, 3");
    assert_eq!(rows(&[u32::MAX]), "rows[0] is 4294967295; rule: below the number of rows, 3");
    let found = message(adam.clone().step_rows(&mut TableMut::new(&mut [0f32; 6], 3, 2), &[0, 1], &matrix(1, 2)));
    assert_eq!(found, "values has shape (1, 2); rule: shape (2, 2): the length of rows, and its dim");
}

#[test]
fn bad_master_copies_are_errors() {
    use catalog_softmax::Embeddings;
    let (wide, mut narrow) = ([1f32; 6], [bf16::ONE; 6]);
    let sgd = || Optimizer::sgd(0.1).expect("a rate");
    let adam = Optimizer::adam(3, 2, 0.1).expect("valid options");
    assert!(message(sgd().with_master_copy(Embeddings::new(&wide, 3, 3))).starts_with("table has 6 elements"));
    assert!(message(adam.with_master_copy(Embeddings::new(&wide, 2, 3))).starts_with("table has shape (2, 3)"));
    let gradient = |rows: usize, dim: usize| Matrix { values: vec![1.0; 6], rows, dim };
    let mut master = sgd().with_master_copy(Embeddings::new(&wide, 3, 2)).expect("a table");
    let before = master.clone();
    let found = message(master.step(&mut TableMut::new(&mut wide.clone(), 3, 2), &gradient(3, 2)));
    assert_eq!(found, "master_copy is given but does not apply; rule: f16 and bf16 tables have one");
    let found = message(master.step(&mut TableMut::new(&mut narrow, 2, 3), &gradient(2, 3)));
    assert_eq!(found, "table has shape (2, 3); rule: shape (3, 2), that of the master copy");
    assert!(master == before && narrow == [bf16::ONE; 6]);
}

/// One optimiser of each kind, after two steps.
fn stepped() -> Vec<(Optimizer, Storage)> {
    let (rows, dim) = (6, 5);
    let mut all = Vec::new();
    for (options, master) in all_options().into_iter().flat_map(|options| [(options, false), (options, true)]) {
        let mut values = Storage::new(&random(rows * dim, 4), DType::Bf16);
        let mut optimizer = options.optimizer(rows, dim).with_rounding_seed(3);
        if master {
            optimizer = optimizer.with_master_copy(values.view(dim)).expect("its shape");
        }
        for step in 0..2 {
            optimizer.step(&mut table(&mut values, dim, 0), &gradient(rows, dim, step)).expect("shapes that fit");
        }
        all.push((optimizer, values));
    }
    all
}

#[test]
fn a_restored_optimiser_goes_on_bitwise() {
    for (mut optimizer, mut values) in stepped() {
        let bytes = optimizer.to_bytes();
        let (mut restored, mut other) =
            (Optimizer::from_bytes(&bytes).expect("a state as it was saved"), values.clone());
        assert_eq!(restored, optimizer);
        assert_eq!(restored.to_bytes(), bytes);
        for (optimizer, values) in [(&mut optimizer, &mut values), (&mut restored, &mut other)] {
            optimizer.set_learning_rate(0.05).expect("a rate");
            optimizer.step(&mut table(values, 5, 0), &gradient(6, 5, 9)).expect("shapes that fit");
        }
        assert_eq!(restored, optimizer);
        assert_eq!((bits(&values), optimizer.steps(), optimizer.learning_rate()), (bits(&other), 3, 0.05));
        assert_ne!(optimizer.to_bytes(), bytes);
    }
}

/// Cut off, damaged in any byte, and with a wrong number behind a right checksum.
#[test]
fn bytes_of_no_optimiser_are_errors() {
    for (optimizer, _) in stepped() {
        let bytes = optimizer.to_bytes();
        for at in 0..bytes.len() {
            assert!(Optimizer::from_bytes(&bytes[..at]).is_err(), "cut off at {at}");
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(Optimizer::from_bytes(&damaged).is_err(), "damaged at {at}");
        }
        let longer = forge::queue([&bytes[..], &[0; 8]].concat());
        assert!(message(Optimizer::from_bytes(&longer)).starts_with("bytes has 8 after the contents"));
        // Magic, version, rule; learning rate, decay; rows and dim of state and master copy.
        let wrong = [(0, 1), (1, 2), (2, 3), (5, f64::NAN.to_bits()), (6, (-1f64).to_bits())];
        let sizes = [10, 11, 12, 13].into_iter().flat_map(|word| [(word, 1 << 31), (word, u64::MAX), (word, 7)]);
        for (word, number) in wrong.into_iter().chain(sizes) {
            let forged = forge::queue(forge::with(&bytes, 8 * word, u64::to_ne_bytes(number)));
            let found = message(Optimizer::from_bytes(&forged));
            assert!(found.starts_with("bytes "), "{word}: {found}");
        }
        // Options that another rule has.
        for (word, number) in [(7, 0.0), (8, 1.0), (9, 1.0), (7, -0.0), (8, -0.0)] {
            let forged = forge::queue(forge::with(&bytes, 8 * word, f64::to_ne_bytes(number)));
            match Optimizer::from_bytes(&forged) {
                Ok(same) => assert_eq!(same.to_bytes(), forged),
                Err(error) => assert!(error.to_string().starts_with("bytes "), "{error}"),
            }
        }
    }
    // G and v are sums of squares.
    let adagrad = Optimizer::row_adagrad(2, 0.1).expect("valid options").to_bytes();
    let forged = forge::queue(forge::with(&adagrad, 8 * 14, u64::to_ne_bytes(u64::from((-1f32).to_bits()))));
    let found = message(Optimizer::from_bytes(&forged));
    assert!(found.starts_with("bytes is a state that no optimiser has (state[0] is -1"), "{found}");
}
