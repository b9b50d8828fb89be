//! What only the crate can see: stretches, and the numbers behind stochastic rounding.

use half::{bf16, f16};

use super::rounding::{Half, StepBits};
use super::{Optimizer, Stretch, TableMut};

const ROWS: usize = 23;
/// More than the columns that are wide at a time, and no multiple of them.
const DIM: usize = 150;
const PADDING: usize = 3;

fn number(i: usize) -> f32 {
    (i as f32 * 0.7).sin()
}

fn optimizers(half: bool) -> Vec<Optimizer> {
    let start: Vec<f32> = (0..ROWS * DIM).map(number).collect();
    let all = [
        Optimizer::sgd(0.1),
        Optimizer::row_adagrad(ROWS, 0.1),
        Optimizer::adam(ROWS, DIM, 0.1).and_then(|adam| adam.with_weight_decay(0.01)),
    ];
    let all: Vec<Optimizer> = all.into_iter().map(|optimizer| optimizer.expect("valid options")).collect();
    let master = |optimizer: &Optimizer| {
        let table = crate::Embeddings::new(&start, ROWS, DIM);
        optimizer.clone().with_master_copy(table).expect("the state's shape")
    };
    let copies: Vec<Optimizer> = all.iter().filter(|_| half).map(master).collect();
    all.into_iter().chain(copies).collect()
}

/// Two steps on stretches that end at `ends`, those later in the table first: the table, and the optimiser as bytes.
fn stepped<'t>(optimizer: &Optimizer, mut table: TableMut<'t>, ends: &[usize]) -> (TableMut<'t>, Vec<u8>) {
    let mut optimizer = optimizer.clone();
    for step in 0..2 {
        let mut stretches = Vec::new();
        let mut rest = optimizer.begin(&mut table).expect("a table that fits");
        for &end in ends {
            let (stretch, below) = rest.split_at(end);
            stretches.push(stretch);
            rest = below;
        }
        stretches.push(rest);
        let bounds: Vec<usize> =
            stretches.iter().flat_map(|stretch| [stretch.rows().start, stretch.rows().end]).collect();
        let wanted: Vec<usize> = [0].into_iter().chain(ends.iter().flat_map(|&end| [end, end])).chain([ROWS]).collect();
        assert_eq!(bounds, wanted);
        for mut stretch in stretches.into_iter().rev() {
            for row in stretch.rows().rev() {
                let gradient: Vec<f32> = (0..DIM).map(|k| number(31 * row + k + step)).collect();
                stretch.step_row(row, &gradient);
            }
        }
    }
    (table, optimizer.to_bytes())
}

#[test]
fn stretches_do_not_matter() {
    let stride = DIM + PADDING;
    // The last row without its padding.
    let start: Vec<f32> = (0..ROWS * stride - PADDING).map(number).collect();
    let f16s: Vec<f16> = start.iter().map(|&x| f16::from_f32(x)).collect();
    let bf16s: Vec<bf16> = start.iter().map(|&x| bf16::from_f32(x)).collect();
    let cuts: [&[usize]; 5] = [&[], &[1], &[0, 22], &[7, 7, 8, 20], &[ROWS]];
    macro_rules! check {
        ($start:expr, $half:expr) => {
            for optimizer in optimizers($half) {
                let run = |ends: &[usize]| {
                    let mut values = $start.clone();
                    let table = TableMut::new(&mut values, ROWS, DIM).with_stride(stride);
                    let (_, optimizer) = stepped(&optimizer, table, ends);
                    (values, optimizer)
                };
                let (values, state) = run(cuts[0]);
                for (i, (now, before)) in values.iter().zip(&$start).enumerate() {
                    if i % stride >= DIM {
                        assert_eq!(now, before, "between the rows");
                    }
                }
                assert!(values != $start);
                for ends in &cuts[1..] {
                    assert!(run(ends) == (values.clone(), state.clone()), "{ends:?}");
                }
            }
        };
    }
    check!(start, false);
    check!(f16s, true);
    check!(bf16s, true);
}

#[test]
fn a_stretch_shows_its_rows_and_not_their_master_copies() {
    fn is_send<T: Send>(_: &T) {}
    let mut values: Vec<bf16> = (0..4 * 2).map(|i| bf16::from_f32(i as f32)).collect();
    let master = [0.1f32; 8];
    let sgd = Optimizer::sgd(1.0).expect("a rate");
    let mut sgd = sgd.with_master_copy(crate::Embeddings::new(&master, 4, 2)).expect("a table");
    let mut table = TableMut::new(&mut values, 4, 2);
    let (_, mut below): (Stretch<'_>, Stretch<'_>) = sgd.begin(&mut table).expect("a table that fits").split_at(2);
    is_send(&below);
    let mut row = [0f32; 2];
    below.widen_row(3, &mut row);
    assert_eq!(row, [6.0, 7.0]);
    below.step_row(3, &[0.0, 1.0]);
    below.widen_row(3, &mut row);
    assert_eq!(row, [0.1f32, 0.1 - 1.0].map(|x| bf16::from_f32(x).to_f32()));
}

/// Numbers of all exponents and signs, and both ends of the random bits.
#[test]
fn rounding_chooses_one_of_two_neighbours() {
    let samples = (0..1 << 16).map(|i: u32| f32::from_bits((i << 16) ^ i.wrapping_mul(0x9e37)));
    for x in samples {
        // Where f16 has infinity, the neighbour is 2^16.
        let f16s = [0, u32::MAX].map(|random| f16::neighbour(x, random));
        assert!(f16s.iter().all(|y| y.abs() <= 65536.0 || x.abs() >= 65536.0 || x.is_nan()));
        let f16s = f16s.map(|y| if y.abs() == 65536.0 { f32::INFINITY.copysign(y) } else { y });
        let bf16s = [0, u32::MAX].map(|random| bf16::neighbour(x, random));
        for (kind, neighbours, nearest) in
            [("f16", f16s, f16::from_f32(x).to_f32()), ("bf16", bf16s, bf16::from_f32(x).to_f32())]
        {
            if x.is_nan() {
                assert!(neighbours.iter().all(|y| y.is_nan()), "{kind}: NaN");
                continue;
            }
            let ends = [neighbours[0].min(neighbours[1]), neighbours[0].max(neighbours[1])];
            // f16 has infinity alone from 2^16 on, and no random bits for numbers below 2^-56.
            let past = kind == "f16" && (x.abs() >= 65536.0 || x.abs() < f32::exp2(-56.0));
            assert!(past || (ends[0] <= x && x <= ends[1]), "{kind}: {x:e} between {ends:?}");
            assert!(ends.contains(&nearest) || past, "{kind}: {x:e} is near {nearest:e}, not {ends:?}");
            let on_grid = |y: f32| match kind {
                "f16" => f16::from_f32(y).to_f32() == y || past,
                _ => bf16::from_f32(y).to_f32() == y,
            };
            assert!(ends.iter().all(|&y| on_grid(y)), "{kind}: {x:e} became {ends:?}");
            if nearest == x {
                assert_eq!(neighbours.map(f32::to_bits), [x.to_bits(); 2], "{kind}: {x:e} is exact");
            } else {
                assert!(past || ends[0] < ends[1], "{kind}: {x:e} always becomes {ends:?}");
            }
        }
    }
}

/// Counts, over all random bits of a coarse grid, how often numbers are rounded up: as often as they should be.
#[test]
fn the_share_of_random_bits_that_round_up_is_exact() {
    const GRID: u32 = 1 << 16;
    // Spread over the whole range, the lowest bits included.
    let all = |neighbour: fn(f32, u32) -> f32, x: f32| {
        (0..GRID).map(|i| f64::from(neighbour(x, i << 16 | i))).sum::<f64>() / f64::from(GRID)
    };
    let (subnormal, spacing) = (5.3 / (1 << 24) as f32, 1.0 / f64::from(1 << 24));
    let cases = [
        (bf16::neighbour as fn(f32, u32) -> f32, 1.003, 1.0 / 128.0),
        (bf16::neighbour, -1e-40, 9.2e-41),
        (f16::neighbour, 1.0003, 1.0 / 1024.0),
        (f16::neighbour, -333.33, 0.25),
        (f16::neighbour, subnormal, spacing),
        (f16::neighbour, -subnormal / 50.0, spacing),
    ];
    for (neighbour, x, spacing) in cases {
        let mean = all(neighbour, x);
        assert!((mean - f64::from(x)).abs() <= spacing / f64::from(GRID), "{x:e} has the mean {mean:e}");
    }
}

/// SplitMix64 as its authors write it, with a state that goes on.
#[test]
fn bits_are_those_of_split_mix() {
    let finish = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let (seed, step, row) = (7u64, 3u64, 41usize);
    let mut state = finish(finish(finish(seed) ^ step).wrapping_add(row as u64));
    let bits = StepBits::new(seed, step).row(row);
    for pair in 0..100 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = finish(state);
        assert_eq!(bits.of_pair(pair), [word as u32, (word >> 32) as u32]);
    }
}

/// Each element is rounded by the bits of its own row and column, wherever a row's columns are taken together.
#[test]
fn elements_are_rounded_by_bits_of_their_own() {
    let (seed, rows) = (5, 3);
    let mut values = vec![bf16::ONE; rows * DIM];
    let mut sgd = Optimizer::sgd(1.0).expect("a rate").with_rounding_seed(seed);
    let gradient = crate::Matrix { values: (0..rows * DIM).map(|i| 0.01 * number(i)).collect(), rows, dim: DIM };
    sgd.step(&mut TableMut::new(&mut values, rows, DIM), &gradient).expect("shapes that fit");
    for row in 0..rows {
        let bits = StepBits::new(seed, 1).row(row);
        for (k, &g) in gradient.row(row).iter().enumerate() {
            let wanted = bf16::neighbour(1.0 - g, bits.of_pair(k / 2)[k % 2]);
            assert_eq!(values[row * DIM + k].to_f32(), wanted, "row {row}, column {k}");
        }
    }
}
