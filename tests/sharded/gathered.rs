//! Batches in shards against one process that has all rows and all candidates.

use catalog_softmax::sharded::Gathered;
use catalog_softmax::{
    Backend, Correction, Cpu, DType, Error, Gradients, Output, Reduction, Reference, Request, Result, Similarity,
};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::generate_tables::{CORRECTIONS, FILTERS, REDUCTIONS, filtered};
use catalog_softmax_testing::problem::{PositiveData, Problem, Storage};
use catalog_softmax_testing::scales::Scale;
use catalog_softmax_testing::step::Step;
use catalog_softmax_testing::tolerance::{Expected, Tensor, compare, tensors};

use catalog_softmax_testing::shards::on_ranks;

/// Two orders of summation in float64, as a share of an element's terms times the condition of its row.
const FLOAT64: f64 = 1e-12;

/// One problem for each rank, of `sizes` queries and other numbers of candidates.
fn of_ranks(config: &Config, sizes: &[usize]) -> Vec<Problem> {
    let of_rank = |(rank, &b): (usize, &usize)| {
        let pools = config.pools.iter().map(|n| n + 3 * rank).collect();
        Config { b, pools, seed: config.seed + rank as u64, ..config.clone() }.problem()
    };
    sizes.iter().enumerate().map(of_rank).collect()
}

/// All rows and all candidates, pool by pool in the order of ranks.
fn whole(ranks: &[Problem]) -> Problem {
    let mut whole = ranks[0].clone();
    let storages = |of: &dyn Fn(&Problem) -> Storage| {
        let values: Vec<f32> = ranks.iter().flat_map(|rank| of(rank).to_f32()).collect();
        Storage::new(&values, ranks[0].queries.dtype())
    };
    whole.queries = storages(&|rank| rank.queries.clone());
    for p in 0..whole.pools.len() {
        whole.pools[p].candidates = storages(&|rank| rank.pools[p].candidates.clone());
        whole.pools[p].ids = concatenated(ranks, |rank| rank.pools[p].ids.clone());
        whole.pools[p].log_q = concatenated(ranks, |rank| rank.pools[p].log_q.clone());
    }
    whole.positives = match &ranks[0].positives {
        PositiveData::Index(_) => PositiveData::Index((0..ranks.len()).flat_map(|rank| indices(ranks, rank)).collect()),
        PositiveData::Separate(_) => PositiveData::Separate(storages(&|rank| match &rank.positives {
            PositiveData::Separate(embeddings) => embeddings.clone(),
            PositiveData::Index(_) => unreachable!("all ranks have the same kind"),
        })),
    };
    whole.positive_ids = concatenated(ranks, |rank| rank.positive_ids.clone());
    whole.positive_log_q = concatenated(ranks, |rank| rank.positive_log_q.clone());
    whole.row_weight = concatenated(ranks, |rank| rank.row_weight.clone());
    whole.positive_offsets =
        ranks[0].positive_offsets.as_ref().map(|_| offsets(ranks, |rank| rank.positive_offsets.clone()));
    whole.excluded = ranks[0].excluded.as_ref().map(|_| {
        let ids = concatenated(ranks, |rank| rank.excluded.as_ref().map(|(_, ids)| ids.clone()));
        (offsets(ranks, |rank| rank.excluded.as_ref().map(|(offsets, _)| offsets.clone())), ids.expect("all have them"))
    });
    whole
}

fn concatenated<T>(ranks: &[Problem], of: impl Fn(&Problem) -> Option<Vec<T>>) -> Option<Vec<T>> {
    ranks.iter().map(of).collect::<Option<Vec<_>>>().map(|parts| parts.into_iter().flatten().collect())
}

fn offsets(ranks: &[Problem], of: impl Fn(&Problem) -> Option<Vec<i64>>) -> Vec<i64> {
    let mut all = vec![0];
    for rank in ranks {
        let last = all[all.len() - 1];
        all.extend(of(rank).expect("all ranks have them")[1..].iter().map(|offset| last + offset));
    }
    all
}

/// A rank's positives among the candidates of all.
fn indices(ranks: &[Problem], rank: usize) -> Vec<u32> {
    let PositiveData::Index(own) = &ranks[rank].positives else { unreachable!("all ranks have indices") };
    let len = |rank: &Problem, p: usize| rank.pool_len(&rank.pools[p]);
    let everywhere = |&index: &u32| {
        let (mut at, mut p) = (index as usize, 0);
        while at >= len(&ranks[rank], p) {
            at -= len(&ranks[rank], p);
            p += 1;
        }
        let pools: usize = (0..p).flat_map(|p| ranks.iter().map(move |rank| len(rank, p))).sum();
        (pools + ranks[..rank].iter().map(|rank| len(rank, p)).sum::<usize>() + at) as u32
    };
    own.iter().map(everywhere).collect()
}

/// The results of all ranks as those of one process: one after the other, or one number that all agree on.
fn together<B: Backend>(backend: impl Fn() -> B + Sync, ranks: &[Problem]) -> Vec<Tensor> {
    let steps = on_ranks(ranks, |threads, problem| -> Result<_> {
        let (mut output, mut gradients, batch) = (Output::default(), Gradients::default(), problem.batch()?);
        let request = Request::value_and_grad().with_moments();
        let mut gathered = Gathered::new(backend(), threads);
        gathered.compute(&batch, &problem.loss, request, &mut output, Some(&mut gradients))?;
        Ok(tensors(&Step::from((output, gradients))))
    });
    let mut steps = steps.into_iter().map(|step| step.expect("a step"));
    let mut all = steps.next().expect("a rank");
    for step in steps {
        for (all, tensor) in all.iter_mut().zip(step) {
            match all.name.as_str() {
                "total" | "d_temperature" | "d_log_temperature" => assert_eq!(*all, tensor),
                _ => all.values.extend(tensor.values),
            }
        }
    }
    all
}

fn check(ranks: &[Problem]) -> Result<(), String> {
    let expected = Expected::new(&whole(ranks), DType::F32);
    let found = together(Reference::new, ranks);
    let share = |scales: &Vec<_>| scales.iter().map(|scale: &Scale| FLOAT64 * scale.size + 1e-300).collect();
    let tolerances: Vec<Vec<f64>> = expected.scales.iter().map(share).collect();
    compare(&expected.tensors, &found, &tolerances, 1.0).map_err(|error| format!("reference: {error}"))?;
    expected.check_within(&found, 1.0).map_err(|error| format!("reference: {error}"))?;
    expected.check_within(&together(Cpu::new, ranks), 1.0).map_err(|error| format!("cpu: {error}"))
}

#[test]
fn every_combination_of_options_agrees_with_one_process() {
    let sizes: [&[usize]; 5] = [&[9], &[4, 5], &[1, 7, 2], &[3, 3, 3, 1], &[8, 1]];
    let mut seed = 0;
    for masking in [Masking::None, Masking::Ids, Masking::Excluded] {
        for separate in [false, true] {
            for filter in FILTERS {
                for correction in CORRECTIONS {
                    seed += 1;
                    let config = Config {
                        pools: vec![9, 4][..1 + seed % 2].to_vec(),
                        similarity: if seed % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                        temperature: 0.3,
                        dtype: [DType::F32, DType::F16, DType::Bf16][seed % 3],
                        correction,
                        reduction: REDUCTIONS[seed / 3 % 4],
                        masking,
                        separate,
                        weights: seed % 4 < 2,
                        frozen: if seed % 5 == 0 { 2 } else { 0 },
                        seed: 100 * seed as u64,
                        ..Config::new(1, 1, 6)
                    };
                    let mut ranks = of_ranks(&config, sizes[seed % sizes.len()]);
                    if separate && seed % 3 == 0 {
                        // The first row of each rank has all its positives.
                        for rank in &mut ranks {
                            let (b, pairs) = (rank.num_queries(), rank.num_pairs() as i64);
                            rank.positive_offsets = Some([vec![0], vec![pairs; b]].concat());
                        }
                    }
                    let loss = filtered(&whole(&ranks), filter);
                    ranks.iter_mut().for_each(|rank| rank.loss = loss);
                    check(&ranks).unwrap_or_else(|error| panic!("{error}\nin {config:?}"));
                }
            }
        }
    }
}

#[test]
fn symmetric_losses_agree_with_one_process() {
    for (seed, reduction) in REDUCTIONS.into_iter().enumerate() {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            for masking in [Masking::None, Masking::Ids] {
                let config = Config {
                    symmetric: true,
                    weights: true,
                    reduction,
                    similarity,
                    masking,
                    seed: 10 * seed as u64,
                    ..Config::new(1, 1, 6)
                };
                check(&of_ranks(&config, &[5, 1, 8])).unwrap_or_else(|error| panic!("{error}\nin {config:?}"));
            }
        }
    }
}

#[test]
fn several_tiles_agree_with_one_process() {
    let config = Config {
        pools: vec![700, 33],
        correction: Correction::LogQ,
        masking: Masking::Excluded,
        dtype: DType::Bf16,
        ..Config::new(1, 1, 24)
    };
    check(&of_ranks(&config, &[150, 1, 280])).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_rank_may_have_rows_of_weight_zero_alone() {
    let config = Config { weights: true, reduction: Reduction::WeightedMean, ..Config::new(1, 6, 5) };
    let mut ranks = of_ranks(&config, &[3, 4]);
    ranks[1].row_weight = Some(vec![0.0; 4]);
    check(&ranks).unwrap_or_else(|error| panic!("{error}"));
    ranks[0].row_weight = Some(vec![0.0; 3]);
    let found = on_ranks(&ranks, |threads, problem| {
        Gathered::new(Cpu::new(), threads).value(&problem.batch()?, &problem.loss).map(drop)
    });
    let sum =
        |error: &Result<()>| matches!(error, Err(Error::Value { argument, .. }) if argument == "the sum of row_weight");
    assert!(found.iter().all(sum), "{found:?}");
}

#[test]
fn accumulated_gradients_are_sums() {
    let config = Config { separate: true, pools: vec![7, 4], frozen: 2, ..Config::new(1, 1, 5) };
    let twice = on_ranks(&of_ranks(&config, &[3, 5]), |threads, problem| -> Result<_> {
        let (batch, request, mut output) = (problem.batch()?, Request::value_and_grad(), Output::default());
        let (mut gathered, mut once) = (Gathered::new(Cpu::new(), threads), Gradients::default());
        gathered.compute(&batch, &problem.loss, request, &mut output, Some(&mut once))?;
        let mut twice = once.clone();
        gathered.compute(&batch, &problem.loss, request.accumulate(), &mut output, Some(&mut twice))?;
        Ok((tensors(&Step::from((output.clone(), once))), tensors(&Step::from((output, twice)))))
    });
    for rank in twice {
        let (once, twice) = rank.expect("two steps");
        for (once, twice) in once.iter().zip(&twice).filter(|(once, _)| once.name.starts_with("d_")) {
            let doubled: Vec<f64> = once.values.iter().map(|value| 2.0 * value).collect();
            assert_eq!(doubled, twice.values, "{}", once.name);
        }
    }
}
