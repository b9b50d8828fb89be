use super::*;
use crate::data::Sequences;
use crate::frequencies::LogQ;
use catalog_softmax::Cpu;
use catalog_softmax::optimizer::Optimizer;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Item 1 is a target twice, and the first row has a second positive.
const POSITIVES: [&[u32]; 3] = [&[1, 3], &[4], &[1]];

fn lists(rows: &[&[u32]]) -> ItemLists {
    let mut lists = ItemLists::default();
    lists.set(rows.iter().copied());
    lists
}

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

/// Loss and item gradient of the second of two steps. The first one, with another model, fills the queue. Weights of the
/// gradient are left out unless `weighted`.
fn step(objective: &Objective, model: &Model, queries: &[f32], weighted: bool) -> (f64, Vec<f32>) {
    let split = split();
    let (positives, excluded) = (lists(&POSITIVES), lists(&[&[0, 4], &[2], &[]]));
    let mut candidates = Candidates::new(objective, &split, model.dim()).unwrap();
    let mut earlier = Model::new(6, 4, 0.5, &mut StdRng::seed_from_u64(8)).unwrap();
    candidates.start_epoch(3, 0);
    let step = StepInputs { queries, positives: &positives, excluded: &excluded, loss: objective.loss(0.5) };
    candidates.step(&mut earlier, &step, &mut Cpu::new()).unwrap();
    let before = model.items.clone();
    let mut after = model.clone();
    after.items.optimizer = Optimizer::sgd(1.0).unwrap();
    if weighted || candidates.queue.is_none() {
        candidates.step(&mut after, &step, &mut Cpu::new()).unwrap();
    } else {
        candidates.draw(&positives.firsts(), &step).unwrap();
        candidates.compute_beside_queue(&before, &step, &mut Cpu::new()).unwrap();
        after.items.step(&candidates.item_gradient(&positives.items, None).unwrap()).unwrap();
    }
    let gradient = before.values.iter().zip(&after.items.values).map(|(before, after)| before - after);
    (candidates.output.total, gradient.collect())
}

/// Also that the queue's rows are constants: were their gradient scattered, it would be there and not in the differences.
#[test]
fn the_item_gradient_agrees_with_finite_differences() {
    let mut rng = StdRng::seed_from_u64(9);
    let model = Model::new(6, 4, 0.5, &mut rng).unwrap();
    let queries = Model::new(3, 4, 0.5, &mut rng).unwrap().items.values;
    // Not corrected-logq: its weight is a constant of the step, so its gradient is not the loss's slope.
    let presets = Objective::presets().into_iter().filter(|preset| preset.correction != Correction::CorrectedLogQ);
    let pools = [
        objective("in-batch,uniform:7,unigram:5:0.5,queue:8", LogQ::Exact, Correction::LogQ),
        objective("uniform:7,log-uniform:3,queue:2", LogQ::Streaming, Correction::LogQ),
        objective("uniform:7,queue:8", LogQ::None, Correction::LogQ),
        objective("uniform:7,queue:8", LogQ::CountMin, Correction::LogQNegativesOnly),
        objective("row-uniform:5", LogQ::Exact, Correction::LogQ),
        objective("in-batch,uniform:3,row-unigram:4:0.5", LogQ::Exact, Correction::LogQNegativesOnly),
        objective("row-log-uniform:4,queue:8", LogQ::Streaming, Correction::LogQ),
    ];
    for objective in presets.chain(pools) {
        let (_, gradient) = step(&objective, &model, &queries, false);
        for (at, &expected) in gradient.iter().enumerate() {
            let moved = |by: f32| {
                let mut model = model.clone();
                model.items.values[at] += by;
                step(&objective, &model, &queries, false).0
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
    let model = Model::new(6, 4, 0.5, &mut rng).unwrap();
    let queries = Model::new(3, 4, 0.5, &mut rng).unwrap().items.values;
    let gradients = |list: &str, weighted: bool| {
        step(&objective(list, LogQ::Exact, Correction::LogQ), &model, &queries, weighted).1
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
}

/// log_q is one thing over all pools: with n draws in the union, exp(lse) / n, or exp(lse) with expected counts, estimates the
/// sum of exp(s) over the catalogue without the target. Each pool's own log_q, or a wrong count of draws, would not.
#[test]
fn lse_estimates_the_sum_over_the_catalogue() {
    const B: usize = 5;
    let split = split();
    // Its learning rate is 0.
    let mut model = Model::new(6, 4, 0.5, &mut StdRng::seed_from_u64(1)).unwrap();
    let items = model.items.clone();
    let queries = Model::new(B, 4, 0.5, &mut StdRng::seed_from_u64(2)).unwrap().items.values;
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let excluded = lists(&[&[][..]; B]);
    for (list, sampled, capacity, correction) in [
        ("in-batch,uniform:3", 3, 0, Correction::LogQ),
        ("in-batch,uniform:3,queue:7", 3, 7, Correction::CorrectedLogQ),
        ("in-batch,uniform:3,queue:7", 3, 7, Correction::LogQNegativesOnly),
        ("in-batch,unigram:2:0.5,log-uniform:4", 6, 0, Correction::LogQNegativesOnly),
        ("uniform:2,queue:9", 2, 9, Correction::LogQ),
        ("row-uniform:4", 4, 0, Correction::LogQ),
        ("in-batch,row-unigram:3:0.5,uniform:2,queue:7", 5, 7, Correction::LogQNegativesOnly),
    ] {
        let objective = objective(list, LogQ::Exact, correction);
        let mut candidates = Candidates::new(&objective, &split, 4).unwrap();
        candidates.start_epoch(1, 0);
        let mut rng = StdRng::seed_from_u64(3);
        let mut ratios = Vec::new();
        for step in 0..10_000 {
            // Drawn as the log has them: 1, 1, 1, 2, 2, 3, 4.
            let targets: [u32; B] = std::array::from_fn(|_| [1, 1, 1, 2, 2, 3, 4][rng.random_range(0..7)]);
            let positives = lists(&targets.each_ref().map(std::slice::from_ref));
            let loss = objective.loss(0.7);
            let given = StepInputs { queries: &queries, positives: &positives, excluded: &excluded, loss };
            let (output, _) = candidates.step(&mut model, &given, &mut Cpu::new()).unwrap();
            let in_batch = if objective.in_batch() { B - 1 } else { 0 };
            let draws = match correction {
                // Expected counts have it in them.
                Correction::LogQNegativesOnly => 1,
                _ => in_batch + sampled + capacity.min(B * step),
            };
            let ratio = |row: usize| {
                let query = &queries[row * 4..][..4];
                let others = (0..6usize).filter(|&item| item != targets[row] as usize);
                let sum: f64 = others.map(|item| (cosine(query, items.row(item)) / 0.7).exp()).sum();
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
