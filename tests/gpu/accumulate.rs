//! Gradients on device memory that are added to what is there.

use std::sync::Arc;

use catalog_softmax::cuda::{
    DeviceGradients, DeviceOutput, DeviceSlice, DeviceSliceMut, DeviceTableGradient, DeviceUpstream,
};
use catalog_softmax::{Backend, Cuda, DType, Gradients, Output, Reference, Request, Similarity, TableGradient};
use catalog_softmax_testing::on_device::up;
use cudarc::driver::{CudaSlice, CudaStream};

use crate::open::on_stream;
use crate::table_cases::{ALL, Candidates, Case, Filter, NO_POOL, ROWS, WHOLE, assert_near, wide};
use crate::tables_on_device::OnDevice;

/// All gradients of a step, on the host. Empty where a batch has none.
#[derive(Clone, Debug, PartialEq)]
struct Values {
    d_queries: Vec<f32>,
    d_pools: Vec<Vec<f32>>,
    d_positives: Vec<f32>,
    d_table: Vec<f32>,
    temperature: [f64; 2],
}

impl Values {
    fn of(gradients: &Gradients<f64>) -> Values {
        let narrow = |values: &[f64]| values.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let d_table = gradients.d_table.as_ref().and_then(TableGradient::dense);
        Values {
            d_queries: narrow(&gradients.d_queries.values),
            d_pools: gradients.d_candidates.iter().map(|d| narrow(&d.values)).collect(),
            d_positives: gradients.d_positive_embeddings.as_ref().map_or_else(Vec::new, |d| narrow(&d.values)),
            d_table: d_table.map_or_else(Vec::new, |d| narrow(&d.values)),
            temperature: [gradients.d_temperature, gradients.d_log_temperature],
        }
    }

    /// All of them, in one order.
    fn parts(&self) -> impl Iterator<Item = &Vec<f32>> {
        [&self.d_queries, &self.d_positives, &self.d_table].into_iter().chain(&self.d_pools)
    }

    fn map(&self, change: impl Fn(&[f32]) -> Vec<f32>) -> Values {
        Values {
            d_queries: change(&self.d_queries),
            d_pools: self.d_pools.iter().map(|d| change(d)).collect(),
            d_positives: change(&self.d_positives),
            d_table: change(&self.d_table),
            temperature: [-0.75, 2.5],
        }
    }
}

/// How a step computes its gradients.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// With its loss.
    Step,
    /// From half of the derivatives that an earlier step gave.
    Alone,
}

/// The gradients of a step whose places hold `before`.
fn step(stream: &Arc<CudaStream>, cuda: &mut Cuda, case: &Case, before: &Values, accumulate: bool, way: Way) -> Values {
    let data = case.data();
    let (inputs, loss) = (OnDevice::new(stream, &data), case.loss());
    let (batch, b, dim, pairs) = (inputs.batch(case), case.sizes.0, case.sizes.3, data.batch().num_positives());
    let memory = |values: &Vec<f32>| (!values.is_empty()).then(|| up(stream, values));
    let mut d_queries = up(stream, &before.d_queries);
    let mut d_pools: Vec<Option<CudaSlice<f32>>> = before.d_pools.iter().map(memory).collect();
    let (mut d_positives, mut d_table) = (memory(&before.d_positives), memory(&before.d_table));
    let [mut d_temperature, mut d_log_temperature] = before.temperature.map(|x| up(stream, &[x]));
    let places = d_pools.iter_mut().map(|d| d.as_mut().map(DeviceSliceMut::new)).collect();
    let mut gradients = DeviceGradients::new(DeviceSliceMut::new(&mut d_queries), places);
    gradients.d_positive_embeddings = d_positives.as_mut().map(DeviceSliceMut::new);
    gradients.d_table = d_table.as_mut().map(|d| DeviceTableGradient::Dense(DeviceSliceMut::new(d)));
    gradients.d_temperature = Some(DeviceSliceMut::new(&mut d_temperature));
    gradients.d_log_temperature = Some(DeviceSliceMut::new(&mut d_log_temperature));
    gradients.accumulate = accumulate;
    let zeros = |count: usize| up(stream, &vec![0.0f64; count]);
    let (mut total, mut lse, mut d_lse, mut d_positive) = (zeros(1), zeros(b), zeros(b), zeros(pairs));
    let (mut expected, mut num_negatives) = (up(stream, &vec![0.0f32; b * dim]), up(stream, &vec![0u64; b]));
    match way {
        Way::Step => {
            let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut total));
            output.gradients = Some(gradients);
            cuda.compute_on_device(&batch, &loss, &mut output).expect("a loss that fits");
            drop(output);
        }
        Way::Alone => {
            let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut total));
            output.lse = Some(DeviceSliceMut::new(&mut lse));
            output.num_negatives = Some(DeviceSliceMut::new(&mut num_negatives));
            output.expected_negative = Some(DeviceSliceMut::new(&mut expected));
            output.d_lse = Some(DeviceSliceMut::new(&mut d_lse));
            output.d_positive = Some(DeviceSliceMut::new(&mut d_positive));
            cuda.compute_on_device(&batch, &loss, &mut output).expect("a loss that fits");
            drop(output);
            // Others than the device's own, so that these and no others are used.
            let half = |d: &CudaSlice<f64>| {
                let values = stream.clone_dtoh(d).expect("a result");
                up(stream, &values.iter().map(|x| 0.5 * x).collect::<Vec<_>>())
            };
            let (d_lse, d_positive) = (half(&d_lse), half(&d_positive));
            let upstream = DeviceUpstream {
                lse: DeviceSlice::new(&lse),
                num_negatives: DeviceSlice::new(&num_negatives),
                expected_negative: DeviceSlice::new(&expected),
                d_lse: DeviceSlice::new(&d_lse),
                d_positive: DeviceSlice::new(&d_positive),
            };
            cuda.gradients_on_device(&batch, &loss, &upstream, &mut gradients).expect("a loss that fits");
            drop(gradients);
        }
    }
    cuda.fault().expect("valid input");
    let down = |memory: &Option<CudaSlice<f32>>| {
        memory.as_ref().map_or_else(Vec::new, |m| stream.clone_dtoh(m).expect("a result"))
    };
    let one = |memory: &CudaSlice<f64>| stream.clone_dtoh(memory).expect("a result")[0];
    Values {
        d_queries: stream.clone_dtoh(&d_queries).expect("a result"),
        d_pools: d_pools.iter().map(down).collect(),
        d_positives: down(&d_positives),
        d_table: down(&d_table),
        temperature: [one(&d_temperature), one(&d_log_temperature)],
    }
}

/// What was there comes in by one addition to what a step that overwrites gives, and all is near the reference.
fn adds((stream, cuda): &mut (Arc<CudaStream>, Cuda), case: &Case) {
    let (data, loss) = (case.data(), case.loss());
    let (batch, request) = (data.batch(), Request::value_and_grad());
    let (mut output, mut gradients) = (Output::default(), Gradients::default());
    Reference::new().compute(&batch, &loss, request, &mut output, Some(&mut gradients)).expect("a loss that fits");
    let reference = Values::of(&gradients);
    // Of the size of the gradients, and in another order.
    let before = reference.map(|values| values.iter().rev().copied().collect());
    let nan = reference.map(|values| vec![f32::NAN; values.len()]);
    for way in [Way::Step, Way::Alone] {
        let fresh = step(stream, cuda, case, &nan, false, way);
        let added = step(stream, cuda, case, &before, true, way);
        for ((added, fresh), (before, reference)) in
            added.parts().zip(fresh.parts()).zip(before.parts().zip(reference.parts()))
        {
            let sums: Vec<f32> = before.iter().zip(fresh).map(|(a, b)| a + b).collect();
            assert_eq!(added, &sums, "{way:?} of {case:?}");
            let part = if matches!(way, Way::Alone) { 0.5 } else { 1.0 };
            let wanted: Vec<f64> =
                before.iter().zip(reference).map(|(&a, &b)| f64::from(a) + part * f64::from(b)).collect();
            assert_near("a sum", case, &wide(added), &wanted, case.sizes.3);
        }
        let pairs = added.temperature.iter().zip(before.temperature).zip(fresh.temperature);
        pairs.for_each(|((&added, before), fresh)| assert_eq!(added, before + fresh, "{way:?} of {case:?}"));
    }
}

pub fn gradients_are_added_to_what_is_there(_: &mut Cuda) {
    let opened = &mut on_stream();
    for candidates in [Candidates::Embeddings, Candidates::Separate, NO_POOL, ROWS, WHOLE, ALL] {
        let own = if matches!(candidates, Candidates::Pools { .. }) { 7 } else { 0 };
        for several in [false, true] {
            adds(opened, &Case { several, own, log_q: several, ids: several, ..Case::new(candidates) });
        }
    }
    adds(opened, &Case { dtype: DType::Bf16, similarity: Similarity::Dot, ..Case::new(ROWS) });
    adds(opened, &Case { own: 5, filter: Filter::Margin(-0.2), ..Case::new(NO_POOL) });
    adds(opened, &Case { gradient: false, own: 5, ..Case::new(ROWS) });
}

/// A row-sparse gradient names the rows of one batch.
pub fn row_sparse_gradients_are_not_added_to(_: &mut Cuda) {
    let (stream, mut cuda) = on_stream();
    let case = Case::new(ROWS);
    let data = case.data();
    let (inputs, b, dim) = (OnDevice::new(&stream, &data), case.sizes.0, case.sizes.3);
    let mut total = up(&stream, &[0.0f64]);
    let (mut d_queries, mut values) = (up(&stream, &vec![0.0f32; b * dim]), up(&stream, &vec![0.0f32; 90 * dim]));
    let (mut rows, mut num_rows) = (up(&stream, &vec![0u32; 90]), up(&stream, &[0u64]));
    let mut gradients = DeviceGradients::new(DeviceSliceMut::new(&mut d_queries), vec![None]);
    gradients.d_table = Some(DeviceTableGradient::RowSparse {
        rows: DeviceSliceMut::new(&mut rows),
        values: DeviceSliceMut::new(&mut values),
        num_rows: DeviceSliceMut::new(&mut num_rows),
    });
    gradients.accumulate = true;
    let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut total));
    output.gradients = Some(gradients);
    let error = cuda.compute_on_device(&inputs.batch(&case), &case.loss(), &mut output).expect_err("no such sum");
    assert!(error.to_string().contains("accumulate"), "{error}");
}
