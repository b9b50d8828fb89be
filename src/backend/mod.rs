//! Backends: one contract, one order of events, several places to run.
//!
//! ```text
//! Batch + Loss → plan → stream (row statistics) → epilogue (loss, d_lse, d_positive) → stream back (gradients)
//! ```

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod device;
pub(crate) mod reference;
pub(crate) mod stream;

use crate::error::{Result, does_not_apply, missing, shape};
use crate::optimizer::{Optimizer, TableMut};
use crate::problem::arrays::check_len;
use crate::problem::batch::Batch;
use crate::problem::embeddings::Real;
use crate::problem::epilogue::Epilogue;
use crate::problem::hardest::Negatives;
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::{Gradients, Output};
use crate::problem::plan::Plan;
use crate::problem::positives::Positives;
use crate::problem::search::{Search, TopK};
use crate::problem::shape::MatrixShape;
use crate::problem::statistics::{Request, RowStatistics};
use stream::{CheckedBatch, CheckedSearch, Stream};

/// Computes losses, statistics and gradients of batches. A backend keeps its workspace between calls.
///
/// Implemented by [`Reference`](crate::Reference) (float64, plain loops: the specification), [`Cpu`](crate::Cpu) and, with the
/// feature `cuda`, `Cuda`. The same inputs on the same machine give bitwise the same outputs, whatever the number of threads.
///
/// ```
/// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Similarity};
/// let queries = [1.0f32, 0.0, 0.0, 1.0];
/// let items = [1.0f32, 0.1, 0.1, 1.0];
/// let batch = Batch::in_batch(Embeddings::new(&queries[..], 2, 2), Embeddings::new(&items[..], 2, 2)).build()?;
/// let (output, gradients) = Cpu::new().value_and_grad(&batch, &Loss::softmax(Similarity::Cosine, 0.1))?;
/// assert!(output.total < 1e-3);
/// assert_eq!((gradients.d_queries.rows, gradients.d_candidates[0].rows), (2, 2));
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
///
/// This trait is sealed; `CONTRIBUTING.md` says how a backend is added to the crate.
pub trait Backend: Stream {
    /// What [`compute`](Backend::compute) would allocate for this batch: tiles, splits and workspace bytes.
    ///
    /// # Errors
    /// As [`compute`](Backend::compute).
    fn plan(&self, batch: &Batch<'_>, loss: &Loss, request: Request) -> Result<Plan> {
        Ok(self.plan_stream(checked(self, batch, loss)?, request))
    }

    /// Writes the loss, the statistics and whatever else `request` names into `output` and `gradients`, whose memory is
    /// reused from step to step. Give `Some` for `gradients` if the request includes gradients, otherwise `None`.
    ///
    /// # Errors
    /// If the loss's options are out of range or do not fit the batch, or if `gradients` does not fit the request;
    /// nothing has been written then. If a device fails during the step; what has been written is then unspecified.
    fn compute(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        output: &mut Output<Self::Real>,
        mut gradients: Option<&mut Gradients<Self::Real>>,
    ) -> Result<()> {
        check_request(batch, request, gradients.as_deref())?;
        if let (true, true, Some(gradients)) = (loss.symmetric, request.accumulate, gradients.as_deref_mut()) {
            let mut fresh = Gradients::default();
            self.compute(batch, loss, Request { accumulate: false, ..request }, output, Some(&mut fresh))?;
            gradients.add(&fresh);
            return Ok(());
        }
        one_direction(self, checked(self, batch, loss)?, request, output, gradients.as_deref_mut())?;
        if loss.symmetric {
            let swapped = batch.swapped()?;
            let (mut other, mut other_gradients) = (Output::default(), gradients.is_some().then(Gradients::default));
            let request = Request { gradients: request.gradients, ..Request::default() };
            let checked = CheckedBatch { batch: &swapped, loss };
            one_direction(self, checked, request, &mut other, other_gradients.as_mut())?;
            average_directions(batch, output, &other);
            if let (Some(gradients), Some(other)) = (gradients, &other_gradients) {
                gradients.average_with_swapped(other);
            }
        }
        Ok(())
    }

    /// Computes the loss and takes the optimiser's step on the table in place of returning the table's gradient. On the CPU
    /// the gradient exists for a few rows at a time, so that a step over a whole catalogue needs no memory of the
    /// catalogue's size. The other gradients are written into `gradients`; its `d_table` is `None`.
    ///
    /// The batch is built from the table's shape, [`Table::of_shape`](crate::Table::of_shape), because it cannot borrow a table that the step
    /// changes. Losses and gradients are those before the step. If a pool with gradient is the whole table, the optimiser
    /// steps every row; otherwise it steps the rows that the batch names, as [`Optimizer::step_rows`] does.
    ///
    /// ```
    /// use catalog_softmax::optimizer::{Optimizer, TableMut};
    /// use catalog_softmax::{Backend, Batch, Cpu, DType, Embeddings, Gradients, Loss, Output, Request, Similarity, Table};
    /// let (b, m, d) = (2, 100, 8);
    /// let queries: Vec<f32> = (0..b * d).map(|i| (i as f32).sin()).collect();
    /// let mut items: Vec<f32> = (0..m * d).map(|i| (i as f32).cos()).collect();
    /// let (mut cpu, loss) = (Cpu::new(), Loss::softmax(Similarity::Cosine, 0.1));
    /// let mut adagrad = Optimizer::row_adagrad(m, 0.1)?;
    /// let batch = Batch::of_table(Embeddings::new(&queries, b, d), Table::of_shape(m, d, DType::F32))
    ///     .positives(&[3u32, 14])
    ///     .build()?;
    /// let (mut output, mut gradients, mut losses) = (Output::default(), Gradients::default(), Vec::new());
    /// for _step in 0..3 {
    ///     let mut table = TableMut::new(&mut items, m, d);
    ///     let request = Request::value_and_grad();
    ///     cpu.update(&batch, &loss, request, &mut table, &mut adagrad, &mut output, &mut gradients)?;
    ///     losses.push(output.total);
    /// }
    /// assert!(losses[2] < losses[1] && losses[1] < losses[0]);
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`compute`](Backend::compute) and [`Optimizer::step`]; a batch without [`Table::of_shape`](crate::Table::of_shape), or of another shape
    /// than `table`; a table without gradient; a request without gradients, or for another form of them. Nothing has been
    /// written then.
    #[expect(clippy::too_many_arguments, reason = "a step reads and writes that many things")]
    fn update(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        table: &mut TableMut<'_>,
        optimizer: &mut Optimizer,
        output: &mut Output<Self::Real>,
        gradients: &mut Gradients<Self::Real>,
    ) -> Result<()> {
        check_update(batch, request, table)?;
        optimizer.check_table(table)?;
        loss.check(batch)?;
        self.check_support(batch, Some(loss))?;
        let here = batch.with_table(table.view());
        self.stream(CheckedBatch { batch: &here, loss }, request, &mut output.statistics)?;
        let Epilogue { loss: losses, probability, d_lse, d_positive, total } =
            loss.checked_epilogue(batch, &output.statistics);
        let checked = CheckedBatch { batch, loss };
        let statistics = &output.statistics;
        self.stream_back_and_step(checked, statistics, &d_lse, &d_positive, gradients, table, optimizer)?;
        (output.total, output.loss, output.probability) = (total, losses, probability);
        Ok(())
    }

    /// The loss and the basic statistics.
    ///
    /// # Errors
    /// As [`compute`](Backend::compute).
    fn value(&mut self, batch: &Batch<'_>, loss: &Loss) -> Result<Output<Self::Real>> {
        let mut output = Output::default();
        self.compute(batch, loss, Request::value(), &mut output, None)?;
        Ok(output)
    }

    /// The loss and its gradients.
    ///
    /// # Errors
    /// As [`compute`](Backend::compute).
    #[expect(clippy::type_complexity, reason = "a pair is simpler than a name for it")]
    fn value_and_grad(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
    ) -> Result<(Output<Self::Real>, Gradients<Self::Real>)> {
        let (mut output, mut gradients) = (Output::default(), Gradients::default());
        self.compute(batch, loss, Request::value_and_grad(), &mut output, Some(&mut gradients))?;
        Ok((output, gradients))
    }

    /// Runs the streaming pass alone and returns row statistics of queries against candidates, for an epilogue of your
    /// own. With [`Request::value_and_grad`] they include what [`gradients`](Backend::gradients) needs.
    ///
    /// # Errors
    /// As [`compute`](Backend::compute).
    fn statistics(&mut self, batch: &Batch<'_>, loss: &Loss, request: Request) -> Result<RowStatistics<Self::Real>> {
        let mut statistics = RowStatistics::default();
        self.stream(checked(self, batch, loss)?, request, &mut statistics)?;
        Ok(statistics)
    }

    /// Runs the backward pass alone: gradients of any function of the rows' `lse` and `positive`, given its derivatives
    /// by these two, `d_lse` (B) and `d_positive` (P). Multiply row weights and the reduction into them yourself.
    ///
    /// A z-loss beside the softmax loss, for example, adds `2 c lse` to each row's `d_lse`:
    ///
    /// ```
    /// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Request, Similarity};
    /// # let queries = [1.0f32, 0.0, 0.0, 1.0];
    /// # let items = [1.0f32, 0.1, 0.1, 1.0];
    /// # let batch = Batch::in_batch(Embeddings::new(&queries[..], 2, 2), Embeddings::new(&items[..], 2, 2)).build()?;
    /// let (mut cpu, loss) = (Cpu::new(), Loss::softmax(Similarity::Cosine, 0.1));
    /// let statistics = cpu.statistics(&batch, &loss, Request::value_and_grad())?;
    /// let mut epilogue = loss.epilogue(&batch, &statistics)?;
    /// for (d_lse, lse) in epilogue.d_lse.iter_mut().zip(&statistics.lse) {
    ///     *d_lse += 2.0 * 1e-4 * lse;
    /// }
    /// let gradients = cpu.gradients(&batch, &loss, &statistics, &epilogue.d_lse, &epilogue.d_positive)?;
    /// assert_eq!(gradients.d_queries.rows, 2);
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`compute`](Backend::compute); a length other than B; statistics from a request without gradients; a
    /// symmetric loss, which has an epilogue for each direction.
    fn gradients(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        statistics: &RowStatistics<Self::Real>,
        d_lse: &[f64],
        d_positive: &[f64],
    ) -> Result<Gradients<Self::Real>> {
        let checked = checked(self, batch, loss)?;
        check_upstream(checked, statistics, d_lse, d_positive)?;
        let mut gradients = Gradients::default();
        self.stream_back(checked, Request::value_and_grad(), statistics, d_lse, d_positive, &mut gradients)?;
        Ok(gradients)
    }

    /// The same into gradients that the caller keeps, in the form that `request` names.
    ///
    /// # Errors
    /// As [`gradients`](Backend::gradients) and [`compute`](Backend::compute).
    #[expect(clippy::too_many_arguments, reason = "each is one array of the step")]
    fn gradients_into(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        statistics: &RowStatistics<Self::Real>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<Self::Real>,
    ) -> Result<()> {
        let checked = checked(self, batch, loss)?;
        check_request(batch, request, Some(gradients))?;
        check_upstream(checked, statistics, d_lse, d_positive)?;
        self.stream_back(checked, request, statistics, d_lse, d_positive, gradients)
    }

    /// The `k` candidates that are most similar to each query, exactly: no approximation and no B x N scores. Ids that
    /// a row excludes are left out. Of equal similarities the smaller index comes first. No temperature is used.
    ///
    /// On one machine the result does not depend on threads or splits, because this order has no ties. See [`Search`]
    /// for an example, and [`TopK`] for rows with fewer than `k`.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) where `k` is 0, above [`Search::MAX_K`] or above the number of candidates; errors
    /// of a device.
    fn top_k(&mut self, search: &Search<'_>, similarity: Similarity, k: usize) -> Result<TopK<Self::Real>> {
        self.search(CheckedSearch::new(search, similarity, k)?)
    }

    /// The `k` negatives of each row that are most similar to its query, among the candidates of the pools: the hardest
    /// in-batch negatives where the pool is the batch's own items. Positives, accidental hits and excluded ids are left
    /// out. Of equal similarities the smaller index comes first.
    ///
    /// With a table they become negatives of the rows' own in a next step: [`TopK::through`] turns indices of candidates
    /// into rows of the table.
    ///
    /// ```
    /// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Pool, RowNegatives, Similarity};
    /// # let table: Vec<f32> = (0..50 * 4).map(|i| (i as f32).sin()).collect();
    /// # let queries: Vec<f32> = (0..3 * 4).map(|i| (i as f32).cos()).collect();
    /// let positives = [7u32, 30, 12];
    /// let over_table = || Batch::of_table(Embeddings::new(&queries, 3, 4), Embeddings::new(&table, 50, 4));
    /// let in_batch = over_table().positives(&positives).pool(Pool::rows(&positives)).build()?;
    /// let hardest = Cpu::new().hardest_negatives(&in_batch, Similarity::Cosine, 2)?.through(&positives);
    /// let step = over_table().positives(&positives).row_negatives(RowNegatives::new(&hardest, 2)).build()?;
    /// assert_eq!(Cpu::new().value(&step, &Loss::softmax(Similarity::Cosine, 0.1))?.statistics.num_negatives, [2, 2, 2]);
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`top_k`](Backend::top_k); a batch without pools.
    fn hardest_negatives(&mut self, batch: &Batch<'_>, similarity: Similarity, k: usize) -> Result<TopK<Self::Real>> {
        batch.check_table_is_here()?;
        self.check_support(batch, None)?;
        let negatives = Negatives::of_batch(batch)?;
        self.search(CheckedSearch::new(&negatives.search(batch), similarity, k)?)
    }

    /// What [`top_k`](Backend::top_k) would allocate beside its result.
    ///
    /// # Errors
    /// As [`top_k`](Backend::top_k).
    fn plan_top_k(&self, search: &Search<'_>, similarity: Similarity, k: usize) -> Result<Plan> {
        Ok(self.plan_search(CheckedSearch::new(search, similarity, k)?))
    }
}

/// A batch and a loss that fit each other and that the backend computes.
fn checked<'a, S: Stream + ?Sized>(stream: &S, batch: &'a Batch<'a>, loss: &'a Loss) -> Result<CheckedBatch<'a>> {
    let checked = CheckedBatch::new(batch, loss)?;
    stream.check_support(batch, Some(loss))?;
    Ok(checked)
}

/// Whether there is a place for gradients if and only if they are asked for, and whether options of gradients apply.
pub(crate) fn check_request<T: Real>(
    batch: &Batch<'_>,
    request: Request,
    gradients: Option<&Gradients<T>>,
) -> Result<()> {
    match (request.gradients, gradients) {
        (true, None) => return Err(missing("gradients", "the request is for gradients: say where they go")),
        (false, Some(_)) => return Err(does_not_apply("gradients", "the request is for none")),
        (true, Some(gradients)) if request.accumulate => gradients.check_shapes(batch, request)?,
        (false, None) if request.accumulate => {
            return Err(does_not_apply("request.accumulate", "the request is for no gradients"));
        }
        _ => {}
    }
    if request.row_sparse && batch.matrix.table.is_none() {
        return Err(does_not_apply("request.row_sparse", "a batch over a table has row-sparse gradients"));
    }
    Ok(())
}

/// The rules about a batch whose table is stepped.
pub(crate) fn check_update(batch: &Batch<'_>, request: Request, table: &TableMut<'_>) -> Result<()> {
    const OF_SHAPE: &str = "update is given the table: build the batch by Batch::of_table with Table::of_shape";
    let Some(of_batch) = &batch.matrix.table else { return Err(missing("table", OF_SHAPE)) };
    if of_batch.embeddings.is_some() {
        return Err(does_not_apply("the elements of the batch's table", OF_SHAPE));
    }
    if !of_batch.gradient {
        return Err(does_not_apply("table.without_gradient", "update steps the table by its gradient"));
    }
    if !request.gradients {
        return Err(missing("request.gradients", "update computes gradients: Request::value_and_grad()"));
    }
    if request.row_sparse {
        return Err(does_not_apply("request.row_sparse", "update returns no gradient of the table"));
    }
    if request.accumulate {
        return Err(does_not_apply("request.accumulate", "update writes its gradients"));
    }
    table.check("table")?;
    let (found, expected) = (table.view().shape(), of_batch.shape);
    if found == expected {
        return Ok(());
    }
    let shown = |shape: MatrixShape| format!("shape ({}, {}) of {:?}", shape.rows, shape.dim, shape.dtype);
    Err(shape("table", shown(found), format!("the batch's {}", shown(expected))))
}

fn one_direction<S: Stream + ?Sized>(
    stream: &mut S,
    checked: CheckedBatch<'_>,
    request: Request,
    output: &mut Output<S::Real>,
    gradients: Option<&mut Gradients<S::Real>>,
) -> Result<()> {
    stream.stream(checked, request, &mut output.statistics)?;
    let epilogue = checked.loss.checked_epilogue(checked.batch, &output.statistics);
    if let Some(gradients) = gradients {
        stream.stream_back(checked, request, &output.statistics, &epilogue.d_lse, &epilogue.d_positive, gradients)?;
    }
    output.total = epilogue.total;
    output.loss = epilogue.loss;
    output.probability = epilogue.probability;
    Ok(())
}

/// The mean over both directions: candidate `positives[i]` is row i of the swapped batch's query i.
pub(crate) fn average_directions<T: crate::Real>(batch: &Batch<'_>, output: &mut Output<T>, swapped: &Output<T>) {
    let Positives::Index(positives) = &batch.positives else { return };
    for (row, &positive) in positives.iter().enumerate() {
        output.loss[row] = 0.5 * (output.loss[row] + swapped.loss[positive as usize]);
        output.probability[row] = 0.5 * (output.probability[row] + swapped.probability[positive as usize]);
    }
    output.total = 0.5 * (output.total + swapped.total);
}

fn check_upstream<T>(
    CheckedBatch { batch, loss }: CheckedBatch<'_>,
    statistics: &RowStatistics<T>,
    d_lse: &[f64],
    d_positive: &[f64],
) -> Result<()> {
    if loss.symmetric {
        return Err(does_not_apply("symmetric", "an epilogue of your own sees one direction; call it for each"));
    }
    let (b, pairs) = (batch.num_queries(), batch.num_positives());
    const QUERIES: &str = "the number of queries";
    const POSITIVES: &str = "the number of positives";
    check_len("d_lse", d_lse.len(), b, QUERIES)?;
    check_len("d_positive", d_positive.len(), pairs, POSITIVES)?;
    check_len("statistics.lse", statistics.lse.len(), b, QUERIES)?;
    check_len("statistics.positive", statistics.positive.len(), pairs, POSITIVES)?;
    check_len("statistics.num_negatives", statistics.num_negatives.len(), b, QUERIES)?;
    const REQUEST: &str = "gradients need statistics of a request with gradients, Request::value_and_grad()";
    match &statistics.expected_negative {
        None => Err(missing("statistics.expected_negative", REQUEST)),
        Some(o) if (o.rows, o.dim) != (b, batch.dim()) || o.values.len() != b * batch.dim() => {
            let found = format!("shape ({}, {})", o.rows, o.dim);
            Err(shape("statistics.expected_negative", found, format!("shape ({b}, {})", batch.dim())))
        }
        Some(_) => Ok(()),
    }
}
