use super::*;
use crate::data::Sequences;
use crate::frequencies::LogQ;
use catalog_softmax::Cpu;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const TARGETS: [u32; 3] = [1, 4, 1];

/// Six items, of which 1 to 4 are training targets, with log_q of 3, 2, 1 and 1 sevenths.
fn split() -> Split {
    let held_out = [5, 0];
    let trained: [&[u32]; 4] = [&[0, 1, 2, 3, 4], &[0, 1, 2], &[0, 1], &[5]];
    let of_user = trained.iter().map(|items| items.iter().chain(&held_out).copied().collect()).collect();
    Split::new(Sequences { of_user, item_names: (0..6).map(|i| i.to_string()).collect() }).unwrap()
}

fn objective(list: &str, log_q: LogQ, correction: Correction) -> Objective {
    Objective::new(list.parse().unwrap(), log_q, correction).unwrap()
}

/// Loss and item gradient of the second of two steps, in which item 1 is a target twice. The first one, with another model,
/// fills the queue. Weights of the gradient are left out unless `weighted`.
fn step(objective: &Objective, model: &Model, queries: &[f32], weighted: bool, d_items: &mut RowGradient) -> f64 {
    let split = split();
    let mut excluded = ExcludedItems::default();
    excluded.set([&[0u32, 4][..], &[2], &[]].into_iter());
    let mut candidates = Candidates::new(objective, &split, model.dim()).unwrap();
    let earlier = Model::new(6, 4, 0.5, &mut StdRng::seed_from_u64(8));
    candidates.start_epoch(3, 0);
    let step = StepInputs { queries, targets: &TARGETS, excluded: &excluded, loss: objective.loss(0.5) };
    candidates.compute(&earlier, &step, &mut Cpu::new(), &mut RowGradient::of(&model.items)).unwrap();
    candidates.score(model, &step, &mut Cpu::new()).unwrap();
    if !weighted {
        let Candidates { targets, drawn, .. } = &mut candidates;
        std::iter::once(targets).chain(drawn).for_each(|rows| rows.gradient_weight.clear());
    }
    candidates.scatter(d_items);
    candidates.output.total
}

fn by_item(d_items: &RowGradient) -> [f32; 24] {
    let mut gradient = [0.0; 24];
    for (row, d_row) in d_items.iter() {
        gradient[row * 4..row * 4 + 4].copy_from_slice(d_row);
    }
    gradient
}

/// Also that the queue's rows are constants: were their gradient scattered, it would be there and not in the differences.
#[test]
fn the_item_gradient_agrees_with_finite_differences() {
    let mut rng = StdRng::seed_from_u64(9);
    let model = Model::new(6, 4, 0.5, &mut rng);
    let queries = Model::new(3, 4, 0.5, &mut rng).items.values;
    // Not corrected-logq: its weight is a constant of the step, so its gradient is not the loss's slope.
    let presets = Objective::presets().into_iter().filter(|preset| preset.correction != Correction::CorrectedLogQ);
    let pools = [
        objective("in-batch,uniform:7,unigram:5:0.5,queue:8", LogQ::Exact, Correction::LogQ),
        objective("uniform:7,log-uniform:3,queue:2", LogQ::Streaming, Correction::LogQ),
        objective("uniform:7,queue:8", LogQ::None, Correction::LogQ),
        objective("uniform:7,queue:8", LogQ::CountMin, Correction::LogQNegativesOnly),
    ];
    for objective in presets.chain(pools) {
        let mut d_items = RowGradient::of(&model.items);
        step(&objective, &model, &queries, false, &mut d_items);
        for (at, &expected) in by_item(&d_items).iter().enumerate() {
            let moved = |by: f32| {
                let mut model = model.clone();
                model.items.values[at] += by;
                step(&objective, &model, &queries, false, &mut RowGradient::of(&model.items))
            };
            let found = (moved(5e-3) - moved(-5e-3)) / 1e-2;
            assert!((found - f64::from(expected)).abs() < 2e-3, "{} [{at}]: {found} {expected}", objective.name);
        }
    }
}

/// Item 2, a target in neither step, is expected among 2 draws in-batch, 3 in the queue and 70 uniform ones: all but the queue's have
/// a gradient. Of item 1, a target twice, the positives' part has no weight.
#[test]
fn negatives_make_up_for_the_queue_s_gradient() {
    let mut rng = StdRng::seed_from_u64(9);
    let model = Model::new(6, 4, 0.5, &mut rng);
    let queries = Model::new(3, 4, 0.5, &mut rng).items.values;
    let gradients = |list: &str, weighted: bool| {
        let mut d_items = RowGradient::of(&model.items);
        step(&objective(list, LogQ::Exact, Correction::LogQ), &model, &queries, weighted, &mut d_items);
        by_item(&d_items)
    };
    let queued = "in-batch,uniform:70,queue:8";
    let (plain, weighted) = (gradients(queued, false), gradients(queued, true));
    let weight = |q: f32| {
        let with_gradient = 2.0 * q + 70.0 / 6.0;
        (with_gradient + 3.0 * q) / with_gradient
    };
    for (plain, weighted) in plain[8..12].iter().zip(&weighted[8..12]) {
        let weight = weight(2.0 / 7.0);
        assert!(*plain != 0.0 && (weighted - weight * plain).abs() < 1e-6, "{plain} {weighted} {weight}");
    }
    // Not the weight of the item times all of its gradient, nor 1.
    for (plain, weighted) in plain[4..8].iter().zip(&weighted[4..8]) {
        let off = [1.0, weight(3.0 / 7.0)].map(|weight| (weighted - weight * plain).abs());
        assert!(off.iter().all(|&off| off > 1e-3), "{plain} {weighted}: {off:?}");
    }
    let without = "in-batch,uniform:70";
    assert_eq!(gradients(without, true), gradients(without, false));
}

/// log_q is one thing over all pools: with n draws in the union, exp(lse) / n, or exp(lse) with expected counts, estimates the
/// sum of exp(s) over the catalogue without the target. Each pool's own log_q, or a wrong count of draws, would not.
#[test]
fn lse_estimates_the_sum_over_the_catalogue() {
    const B: usize = 5;
    let split = split();
    let model = Model::new(6, 4, 0.5, &mut StdRng::seed_from_u64(1));
    let queries = Model::new(B, 4, 0.5, &mut StdRng::seed_from_u64(2)).items.values;
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let mut excluded = ExcludedItems::default();
    excluded.set([&[][..]; B].into_iter());
    for (list, sampled, capacity, correction) in [
        ("in-batch,uniform:3", 3, 0, Correction::LogQ),
        ("in-batch,uniform:3,queue:7", 3, 7, Correction::CorrectedLogQ),
        ("in-batch,uniform:3,queue:7", 3, 7, Correction::LogQNegativesOnly),
        ("in-batch,unigram:2:0.5,log-uniform:4", 6, 0, Correction::LogQNegativesOnly),
        ("uniform:2,queue:9", 2, 9, Correction::LogQ),
    ] {
        let objective = objective(list, LogQ::Exact, correction);
        let mut candidates = Candidates::new(&objective, &split, 4).unwrap();
        candidates.start_epoch(1, 0);
        let mut rng = StdRng::seed_from_u64(3);
        let mut ratios = Vec::new();
        for step in 0..10_000 {
            // Drawn as the log has them: 1, 1, 1, 2, 2, 3, 4.
            let targets: [u32; B] = std::array::from_fn(|_| [1, 1, 1, 2, 2, 3, 4][rng.random_range(0..7)]);
            let given =
                StepInputs { queries: &queries, targets: &targets, excluded: &excluded, loss: objective.loss(0.7) };
            let (output, _) =
                candidates.compute(&model, &given, &mut Cpu::new(), &mut RowGradient::of(&model.items)).unwrap();
            let in_batch = if objective.in_batch() { B - 1 } else { 0 };
            let draws = match correction {
                // Expected counts have it in them.
                Correction::LogQNegativesOnly => 1,
                _ => in_batch + sampled + capacity.min(B * step),
            };
            let ratio = |row: usize| {
                let query = &queries[row * 4..][..4];
                let others = (0..6usize).filter(|&item| item != targets[row] as usize);
                let sum: f64 = others.map(|item| (cosine(query, model.items.row(item)) / 0.7).exp()).sum();
                output.statistics.lse[row].exp() / (draws as f64 * sum)
            };
            // Rows of a step share their draws, so a step is one sample.
            ratios.push((0..B).map(ratio).sum::<f64>() / B as f64);
        }
        // Steps share the queue's rows with the next two or three: means over blocks of many steps are independent.
        let blocks: Vec<f64> = ratios.chunks_exact(50).map(|block| block.iter().sum::<f64>() / 50.0).collect();
        let n = blocks.len() as f64;
        let mean = blocks.iter().sum::<f64>() / n;
        let deviation = (blocks.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt();
        assert!((mean - 1.0).abs() < 5.0 * deviation, "{list}: {mean} ± {deviation}");
        assert!(deviation < 0.006, "{list}: the test sees nothing at ± {deviation}");
    }
}
