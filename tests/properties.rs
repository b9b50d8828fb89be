//! The properties of every backend, held by the CPU's.

use catalog_softmax::{Backend, Correction, Cpu, DType, Request};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::properties::{everything, lengths_do_not_matter};
use catalog_softmax_testing::properties::{test_each, with_properties, with_table_properties};
use catalog_softmax_testing::tolerance::Expected;

fn cpu() -> Box<dyn Backend<Real = f32>> {
    Box::new(Cpu::new())
}

with_properties!(test_each!(cpu(), |_| DType::F32));
with_table_properties!(test_each!(cpu(), |_| DType::F32));

/// Under cosine the CPU does not look for the maximum of every tile, so scores here rise as fast as they can from tile to
/// tile of each split: candidates are sorted by their similarity with a query that all queries are near to.
#[test]
fn scores_that_rise_from_tile_to_tile() {
    let many = Config::new(30, 100_000, 8).problem();
    let batch = many.batch().expect("a valid problem");
    let plan = Cpu::new().plan(&batch, &many.loss, Request::value()).expect("a loss that fits");
    for (temperature, correction) in [(0.05, Correction::LogQ), (0.02, Correction::None), (0.005, Correction::LogQ)] {
        let n = 3 * plan.splits * plan.block_n;
        let mut problem = Config { temperature, correction, masking: Masking::Ids, ..Config::new(30, n, 8) }.problem();
        let near = problem.queries.to_f32()[..8].to_vec();
        let dot = |x: &[f32]| {
            x.iter().zip(&near).map(|(x, q)| x * q).sum::<f32>() / x.iter().map(|x| x * x).sum::<f32>().sqrt()
        };
        problem.queries = problem.queries.map(|values| {
            values.chunks_mut(8).for_each(|row| row.iter_mut().zip(&near).for_each(|(x, q)| *x = q + 0.1 * *x));
        });
        problem.pools[0].candidates = problem.pools[0].candidates.map(|values| {
            let mut rows: Vec<Vec<f32>> = values.chunks(8).map(<[f32]>::to_vec).collect();
            rows.sort_by(|a, b| dot(a).total_cmp(&dot(b)));
            // The lowest third in the first tile of each split, the highest in the last.
            let thirds: Vec<&[Vec<f32>]> = rows.chunks(plan.splits * plan.block_n).collect();
            let tiles = (0..plan.splits).flat_map(|split| thirds.iter().map(move |third| (split, third)));
            let tile = |(split, third): (usize, &&[Vec<f32>])| third[split * plan.block_n..][..plan.block_n].concat();
            *values = tiles.flat_map(tile).collect();
        });
        let output = everything(&mut Cpu::new(), &problem);
        Expected::new(&problem, DType::F32).check(&output).unwrap_or_else(|error| panic!("{temperature}: {error}"));
    }
}

/// The CUDA backend's rows end at 2^63.
#[test]
fn rows_as_long_as_f32_has_them_change_nothing_under_cosine() {
    for dtype in [DType::F32, DType::Bf16] {
        for longest in [2f32.powi(64), 2f32.powi(100), 2f32.powi(124)] {
            lengths_do_not_matter(&mut Cpu::new(), |_| DType::F32, dtype, longest);
        }
    }
}
