//! What one training step scores: queries, candidate pools, positives, ids, log_q, exclusions and row weights.
//!
//! [`BatchBuilder::build`] is the only place where this input is rejected; what it returns is consistent.

use std::borrow::Cow;

use crate::embeddings::{DType, Embeddings};
use crate::error::{Result, does_not_apply, missing, shape, value};
use crate::search::Search;

/// 64-bit item ids. They are compared for equality only, so signed and unsigned serve alike.
#[derive(Debug, Clone, Copy)]
pub struct Ids<'a>(pub(crate) &'a [u64]);

impl<'a> From<&'a [u64]> for Ids<'a> {
    fn from(ids: &'a [u64]) -> Self {
        Ids(ids)
    }
}
impl<'a> From<&'a [i64]> for Ids<'a> {
    fn from(ids: &'a [i64]) -> Self {
        Ids(bytemuck::cast_slice(ids))
    }
}
impl<'a> From<&'a Vec<u64>> for Ids<'a> {
    fn from(ids: &'a Vec<u64>) -> Self {
        Ids(ids)
    }
}
impl<'a> From<&'a Vec<i64>> for Ids<'a> {
    fn from(ids: &'a Vec<i64>) -> Self {
        Ids(bytemuck::cast_slice(ids))
    }
}

/// Index of each row's positive, counted over the candidates of all pools in the order of the pools.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Indices<'a> {
    /// (B) indices.
    U32(&'a [u32]),
    /// (B) indices, none negative.
    I64(&'a [i64]),
}

impl<'a> From<&'a [u32]> for Indices<'a> {
    fn from(indices: &'a [u32]) -> Self {
        Indices::U32(indices)
    }
}
impl<'a> From<&'a [i64]> for Indices<'a> {
    fn from(indices: &'a [i64]) -> Self {
        Indices::I64(indices)
    }
}
impl<'a> From<&'a Vec<u32>> for Indices<'a> {
    fn from(indices: &'a Vec<u32>) -> Self {
        Indices::U32(indices)
    }
}
impl<'a> From<&'a Vec<i64>> for Indices<'a> {
    fn from(indices: &'a Vec<i64>) -> Self {
        Indices::I64(indices)
    }
}

/// One pool of candidates (N, D): the whole catalogue, a sampled set, the batch's own positives, a queue.
#[derive(Debug, Clone, Copy)]
pub struct Pool<'a> {
    pub(crate) candidates: Embeddings<'a>,
    pub(crate) ids: Option<Ids<'a>>,
    pub(crate) log_q: Option<&'a [f32]>,
    pub(crate) gradient: bool,
}

impl<'a> Pool<'a> {
    /// A pool with no ids and no sampling probabilities, whose embeddings receive a gradient.
    pub fn new(candidates: Embeddings<'a>) -> Self {
        Pool { candidates, ids: None, log_q: None, gradient: true }
    }

    /// The embeddings, e.g. those that a [queue](crate::NegativeQueue::pools) holds.
    pub fn candidates(&self) -> Embeddings<'a> {
        self.candidates
    }

    /// `candidate_ids` (N): candidates that carry the positive's id (accidental hits) or an id that the row excludes
    /// are not negatives of that row.
    pub fn ids(mut self, candidate_ids: impl Into<Ids<'a>>) -> Self {
        self.ids = Some(candidate_ids.into());
        self
    }

    /// `log_q` (N): natural logarithm of the probability with which each candidate is drawn, per draw. Never clipped.
    /// An expected count n·q serves as well, except for [`Correction::CorrectedLogQ`](crate::Correction), which needs
    /// the positive's probability itself.
    pub fn log_q(mut self, log_q: &'a [f32]) -> Self {
        self.log_q = Some(log_q);
        self
    }

    /// The pool's embeddings are constants (a queue, a frozen table): no gradient is computed for them.
    pub fn without_gradient(mut self) -> Self {
        self.gradient = false;
        self
    }
}

impl<'a> From<Embeddings<'a>> for Pool<'a> {
    fn from(candidates: Embeddings<'a>) -> Self {
        Pool::new(candidates)
    }
}

/// Where the positives are, after validation.
#[derive(Debug, Clone)]
pub(crate) enum Positives<'a> {
    /// Indices over the candidates of all pools.
    Index(Cow<'a, [u32]>),
    /// Embeddings of their own (B, D).
    Separate(Embeddings<'a>),
}

#[derive(Debug, Clone, Copy)]
enum GivenPositives<'a> {
    Diagonal,
    Index(Indices<'a>),
    Separate(Embeddings<'a>),
}

/// Per row, ids that are no negatives: CSR with `offsets` (B + 1) into `ids`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Excluded<'a> {
    pub(crate) offsets: &'a [i64],
    pub(crate) ids: Ids<'a>,
}

impl<'a> Excluded<'a> {
    pub(crate) fn row(&self, row: usize) -> &'a [u64] {
        &self.ids.0[self.offsets[row] as usize..self.offsets[row + 1] as usize]
    }
}

/// A validated batch: B queries, N candidates in one or several pools, and each query's positive.
///
/// | builder call | shape | meaning |
/// |---|---|---|
/// | [`Batch::builder`] | (B, D), (N, D) | queries and the first pool of candidates |
/// | [`Batch::in_batch`] | (B, D), (N, D), N >= B | the same, where candidate i is the positive of query i |
/// | [`pool`](BatchBuilder::pool) | (N', D) | a further pool |
/// | [`positives`](BatchBuilder::positives) | (B) | index of each row's positive among the candidates of all pools |
/// | [`positive_embeddings`](BatchBuilder::positive_embeddings) | (B, D) | positives apart from the candidates |
/// | [`positive_ids`](BatchBuilder::positive_ids) | (B) | their item ids |
/// | [`positive_log_q`](BatchBuilder::positive_log_q) | (B) | their log_q |
/// | [`excluded_ids`](BatchBuilder::excluded_ids) | (B + 1), (nnz) | per row, ids that are no negatives |
/// | [`row_weight`](BatchBuilder::row_weight) | (B) | sample weights >= 0 |
///
/// Candidate j is a negative of row i unless it is the row's positive, has the positive's id, or has an id that row i
/// excludes.
///
/// ```
/// use catalog_softmax::{Batch, Embeddings, Pool};
/// let (queries, items) = (vec![1.0f32; 2 * 4], vec![0.5f32; 2 * 4]);
/// let (ids, log_q) = (vec![17u64, 42], vec![-3.0f32, -5.0]);
/// let batch = Batch::in_batch(
///     Embeddings::new(&queries, 2, 4),
///     Pool::new(Embeddings::new(&items, 2, 4)).ids(&ids).log_q(&log_q),
/// )
/// .build()?;
/// assert_eq!((batch.num_queries(), batch.num_candidates(), batch.dim()), (2, 2, 4));
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    pub(crate) queries: Embeddings<'a>,
    pub(crate) pools: Vec<Pool<'a>>,
    pub(crate) positives: Positives<'a>,
    /// Id of each row's positive, where candidates have ids.
    pub(crate) positive_ids: Option<Cow<'a, [u64]>>,
    pub(crate) positive_log_q: Option<Cow<'a, [f32]>>,
    pub(crate) excluded: Option<Excluded<'a>>,
    pub(crate) row_weight: Option<Cow<'a, [f32]>>,
}

/// Collects a [`Batch`]; nothing is checked before [`build`](BatchBuilder::build).
#[derive(Debug, Clone)]
#[must_use]
pub struct BatchBuilder<'a> {
    queries: Embeddings<'a>,
    pools: Vec<Pool<'a>>,
    positives: Option<GivenPositives<'a>>,
    positives_given_twice: bool,
    positive_ids: Option<Ids<'a>>,
    positive_log_q: Option<&'a [f32]>,
    excluded: Option<Excluded<'a>>,
    row_weight: Option<&'a [f32]>,
}

impl<'a> Batch<'a> {
    /// `queries` (B, D) against `candidates` (N, D). Say next where the positives are.
    pub fn builder(queries: Embeddings<'a>, candidates: impl Into<Pool<'a>>) -> BatchBuilder<'a> {
        BatchBuilder {
            queries,
            pools: vec![candidates.into()],
            positives: None,
            positives_given_twice: false,
            positive_ids: None,
            positive_log_q: None,
            excluded: None,
            row_weight: None,
        }
    }

    /// In-batch negatives: candidate i is the positive of query i, the other candidates are its negatives.
    pub fn in_batch(queries: Embeddings<'a>, candidates: impl Into<Pool<'a>>) -> BatchBuilder<'a> {
        let mut builder = Batch::builder(queries, candidates);
        builder.positives = Some(GivenPositives::Diagonal);
        builder
    }

    /// B, the number of queries.
    pub fn num_queries(&self) -> usize {
        self.queries.rows()
    }

    /// N, the number of candidates in all pools together.
    pub fn num_candidates(&self) -> usize {
        self.pools.iter().map(|pool| pool.candidates.rows()).sum()
    }

    /// D, the width of the embeddings.
    pub fn dim(&self) -> usize {
        self.queries.dim()
    }

    /// The element type of all embeddings.
    pub fn dtype(&self) -> DType {
        self.queries.dtype()
    }

    /// The pools with the index of each one's first candidate.
    pub(crate) fn pools_with_start(&self) -> impl Iterator<Item = (usize, &Pool<'a>)> {
        self.pools.iter().scan(0, |start, pool| {
            let first = *start;
            *start += pool.candidates.rows();
            Some((first, pool))
        })
    }

    /// The embedding of candidate `index`, as its pool and row there.
    pub(crate) fn locate(&self, index: usize) -> (usize, usize) {
        let mut row = index;
        for (p, pool) in self.pools.iter().enumerate() {
            match row.checked_sub(pool.candidates.rows()) {
                None => return (p, row),
                Some(rest) => row = rest,
            }
        }
        unreachable!("positives were checked against the number of candidates when the batch was built")
    }

    pub(crate) fn weight(&self, row: usize) -> f64 {
        self.row_weight.as_ref().map_or(1.0, |w| f64::from(w[row]))
    }

    /// The same batch with the sides swapped: candidates as queries, queries as candidates. For symmetric losses.
    pub(crate) fn swapped(&self) -> Result<Batch<'_>> {
        const RULE: &str = "a symmetric loss needs one pool in which each candidate is the positive of one query";
        let Positives::Index(positives) = &self.positives else {
            return Err(does_not_apply("positive_embeddings", RULE));
        };
        let [pool] = self.pools.as_slice() else {
            return Err(shape("candidates", format!("{} pools", self.pools.len()), RULE));
        };
        if !pool.gradient {
            return Err(does_not_apply(
                "candidates.without_gradient",
                "a symmetric loss has a gradient for both sides",
            ));
        }
        let (b, n) = (self.num_queries(), pool.candidates.rows());
        if b != n {
            return Err(shape("candidates", format!("{n} rows for {b} queries"), RULE));
        }
        if self.excluded.is_some() {
            return Err(does_not_apply(
                "excluded_ids",
                "they name candidates; in a symmetric loss queries are candidates",
            ));
        }
        let mut query_of = vec![u32::MAX; n];
        for (row, &positive) in positives.iter().enumerate() {
            if query_of[positive as usize] != u32::MAX {
                return Err(value(format!("positives[{row}]"), positive, RULE));
            }
            query_of[positive as usize] = row as u32;
        }
        let row_weight = self.row_weight.as_ref().map(|w| query_of.iter().map(|&row| w[row as usize]).collect());
        // As a candidate, query i has its positive's id: a pair is masked in both directions or in neither.
        let ids = self.positive_ids.as_deref().map(Ids);
        Ok(Batch {
            queries: pool.candidates,
            pools: vec![Pool { ids, ..Pool::new(self.queries) }],
            positive_ids: pool.ids.map(|ids| Cow::Borrowed(ids.0)),
            positives: Positives::Index(Cow::Owned(query_of)),
            positive_log_q: None,
            excluded: None,
            row_weight,
        })
    }
}

impl<'a> BatchBuilder<'a> {
    /// A further pool of candidates, e.g. uniform negatives beside the batch's own.
    pub fn pool(mut self, pool: impl Into<Pool<'a>>) -> Self {
        self.pools.push(pool.into());
        self
    }

    /// (B): the positive of row i is candidate `positives[i]`, counted over all pools.
    pub fn positives(mut self, positives: impl Into<Indices<'a>>) -> Self {
        self.positives_given_twice |= self.positives.is_some();
        self.positives = Some(GivenPositives::Index(positives.into()));
        self
    }

    /// (B, D): the positives, apart from the candidates. They are negatives of no row.
    pub fn positive_embeddings(mut self, positive_embeddings: Embeddings<'a>) -> Self {
        self.positives_given_twice |= self.positives.is_some();
        self.positives = Some(GivenPositives::Separate(positive_embeddings));
        self
    }

    /// (B): item ids of the positives. Needed to mask accidental hits where the positives are separate; where they are
    /// candidates, their ids are the candidates'.
    pub fn positive_ids(mut self, positive_ids: impl Into<Ids<'a>>) -> Self {
        self.positive_ids = Some(positive_ids.into());
        self
    }

    /// (B): log_q of the positives where they are separate; where they are candidates, their log_q is the candidates'.
    pub fn positive_log_q(mut self, positive_log_q: &'a [f32]) -> Self {
        self.positive_log_q = Some(positive_log_q);
        self
    }

    /// Ids that are no negatives of a row (the user's other positives): those of row i are
    /// `ids[offsets[i]..offsets[i + 1]]`. `offsets` (B + 1) starts at 0 and never falls. Errors call them `exclude_offsets` and
    /// `exclude_ids`.
    pub fn excluded_ids(mut self, offsets: &'a [i64], ids: impl Into<Ids<'a>>) -> Self {
        self.excluded = Some(Excluded { offsets, ids: ids.into() });
        self
    }

    /// (B): sample weights, finite and >= 0.
    pub fn row_weight(mut self, row_weight: &'a [f32]) -> Self {
        self.row_weight = Some(row_weight);
        self
    }

    /// Checks everything and returns the batch.
    ///
    /// # Errors
    /// Names the first argument that breaks a rule: shapes that disagree or are empty, mixed element types, an index
    /// past the candidates, log_q that is NaN or infinite, offsets out of order, a negative or NaN weight, ids missing
    /// where a mask needs them or given where nothing uses them.
    pub fn build(self) -> Result<Batch<'a>> {
        self.check_embeddings()?;
        self.check_pools()?;
        let positives = self.checked_positives()?;
        let positive_ids = self.checked_positive_ids(&positives)?;
        let positive_log_q = self.checked_positive_log_q(&positives)?;
        self.check_excluded()?;
        if let Some(weights) = self.row_weight {
            check_len("row_weight", weights.len(), self.queries.rows())?;
            check_all("row_weight", weights, "finite and >= 0", |w| w.is_finite() && w >= 0.0)?;
        }
        Ok(Batch {
            queries: self.queries,
            pools: self.pools,
            positives,
            positive_ids,
            positive_log_q,
            excluded: self.excluded,
            row_weight: self.row_weight.map(Cow::Borrowed),
        })
    }

    /// Checks everything and returns a search of the best candidates: queries, pools with their ids, excluded ids.
    ///
    /// # Errors
    /// As [`build`](BatchBuilder::build); and where positives, log_q or row weights were given, which a search would have to
    /// ignore.
    pub fn search(self) -> Result<Search<'a>> {
        let for_a_loss = [
            ("positives", self.positives.is_some()),
            ("positive_ids", self.positive_ids.is_some()),
            ("positive_log_q", self.positive_log_q.is_some()),
            ("row_weight", self.row_weight.is_some()),
            ("log_q", self.pools.iter().any(|pool| pool.log_q.is_some())),
        ];
        if let Some((argument, _)) = for_a_loss.into_iter().find(|(_, given)| *given) {
            return Err(does_not_apply(argument, "a search ranks all candidates by similarity alone"));
        }
        self.check_embeddings()?;
        self.check_pools()?;
        self.check_mask_ids()?;
        self.check_excluded()?;
        Ok(Search::new(Batch {
            queries: self.queries,
            pools: self.pools,
            // Separate positives without ids mask nothing, and nobody looks at them.
            positives: Positives::Separate(self.queries),
            positive_ids: None,
            positive_log_q: None,
            excluded: self.excluded,
            row_weight: None,
        }))
    }

    fn check_embeddings(&self) -> Result<()> {
        self.queries.check("queries")?;
        let mut named = Vec::new();
        for (p, pool) in self.pools.iter().enumerate() {
            named.push((pool_argument(self.pools.len(), p, "candidates"), pool.candidates));
        }
        if let Some(GivenPositives::Separate(embeddings)) = self.positives {
            check_len("positive_embeddings", embeddings.rows(), self.queries.rows())?;
            named.push(("positive_embeddings".into(), embeddings));
        }
        for (name, embeddings) in named {
            embeddings.check(&name)?;
            if embeddings.dim() != self.queries.dim() {
                let rule = format!("the dim of queries, which is {}", self.queries.dim());
                return Err(shape(name, format!("dim {}", embeddings.dim()), rule));
            }
            if embeddings.dtype() != self.queries.dtype() {
                let rule = format!("the element type of queries, which is {:?}", self.queries.dtype());
                return Err(shape(name, format!("elements of type {:?}", embeddings.dtype()), rule));
            }
        }
        let (b, n) = (self.queries.rows(), self.num_candidates());
        if b > u32::MAX as usize || n > u32::MAX as usize {
            return Err(shape("batch", format!("{b} queries and {n} candidates"), "at most 2^32 - 1 of each"));
        }
        Ok(())
    }

    fn num_candidates(&self) -> usize {
        self.pools.iter().map(|pool| pool.candidates.rows()).fold(0, usize::saturating_add)
    }

    fn check_pools(&self) -> Result<()> {
        let have_ids = self.pools.iter().any(|pool| pool.ids.is_some());
        let have_log_q = self.pools.iter().any(|pool| pool.log_q.is_some());
        for (p, pool) in self.pools.iter().enumerate() {
            let argument = |field| pool_argument(self.pools.len(), p, field);
            match pool.ids {
                Some(ids) => check_len(&argument("candidate_ids"), ids.0.len(), pool.candidates.rows())?,
                None if have_ids => return Err(missing(argument("candidate_ids"), "all pools have ids or none has")),
                None => {}
            }
            match pool.log_q {
                Some(log_q) => {
                    check_len(&argument("log_q"), log_q.len(), pool.candidates.rows())?;
                    check_all(&argument("log_q"), log_q, "finite", f32::is_finite)?;
                }
                None if have_log_q => return Err(missing(argument("log_q"), "all pools have log_q or none has")),
                None => {}
            }
        }
        Ok(())
    }

    fn checked_positives(&self) -> Result<Positives<'a>> {
        if self.positives_given_twice {
            let rule = "a batch has one of: the diagonal of in_batch, positives, positive_embeddings";
            return Err(does_not_apply("a second kind of positives", rule));
        }
        let (b, n) = (self.queries.rows(), self.num_candidates());
        let Some(positives) = self.positives else {
            return Err(missing("positives", "every row has one: positives (B) or positive_embeddings (B, D)"));
        };
        const RANGE: &str = "at least 0 and less than the number of candidates in all pools";
        match positives {
            GivenPositives::Separate(embeddings) => Ok(Positives::Separate(embeddings)),
            GivenPositives::Diagonal => {
                let rows = self.pools[0].candidates.rows();
                if rows < b {
                    let rule = format!("in_batch needs a candidate for each of {b} queries in the first pool");
                    return Err(shape("candidates", format!("{rows} rows"), rule));
                }
                Ok(Positives::Index((0..b as u32).collect()))
            }
            GivenPositives::Index(Indices::U32(indices)) => {
                check_len("positives", indices.len(), b)?;
                match indices.iter().position(|&i| i as usize >= n) {
                    Some(row) => Err(value(format!("positives[{row}]"), indices[row], RANGE)),
                    None => Ok(Positives::Index(Cow::Borrowed(indices))),
                }
            }
            GivenPositives::Index(Indices::I64(indices)) => {
                check_len("positives", indices.len(), b)?;
                match indices.iter().position(|&i| i < 0 || i as u64 >= n as u64) {
                    Some(row) => Err(value(format!("positives[{row}]"), indices[row], RANGE)),
                    None => Ok(Positives::Index(indices.iter().map(|&i| i as u32).collect())),
                }
            }
        }
    }

    fn check_mask_ids(&self) -> Result<()> {
        let masks = self.positive_ids.is_some() || self.excluded.is_some();
        if masks && self.pools[0].ids.is_none() {
            return Err(missing("candidate_ids", "positive_ids and excluded_ids are compared with them"));
        }
        Ok(())
    }

    fn checked_positive_ids(&self, positives: &Positives<'a>) -> Result<Option<Cow<'a, [u64]>>> {
        self.check_mask_ids()?;
        let have_ids = self.pools[0].ids.is_some();
        match (positives, self.positive_ids) {
            (Positives::Index(_), Some(_)) => {
                Err(does_not_apply("positive_ids", "positives given by index have the ids of their candidates"))
            }
            (Positives::Index(positives), None) if have_ids => {
                Ok(Some(gather(&self.pools, positives, |pool| pool.ids.map(|ids| ids.0))))
            }
            (Positives::Index(_), None) => Ok(None),
            (Positives::Separate(_), Some(ids)) => {
                check_len("positive_ids", ids.0.len(), self.queries.rows())?;
                Ok(Some(Cow::Borrowed(ids.0)))
            }
            (Positives::Separate(_), None) if have_ids => {
                Err(missing("positive_ids", "separate positives need ids where candidates have them"))
            }
            (Positives::Separate(_), None) => Ok(None),
        }
    }

    fn checked_positive_log_q(&self, positives: &Positives<'a>) -> Result<Option<Cow<'a, [f32]>>> {
        match (positives, self.positive_log_q) {
            (Positives::Index(_), Some(_)) => {
                Err(does_not_apply("positive_log_q", "positives given by index have the log_q of their candidates"))
            }
            (Positives::Index(positives), None) if self.pools[0].log_q.is_some() => {
                Ok(Some(gather(&self.pools, positives, |pool| pool.log_q)))
            }
            (_, None) => Ok(None),
            (Positives::Separate(_), Some(log_q)) => {
                check_len("positive_log_q", log_q.len(), self.queries.rows())?;
                check_all("positive_log_q", log_q, "finite", f32::is_finite)?;
                Ok(Some(Cow::Borrowed(log_q)))
            }
        }
    }

    fn check_excluded(&self) -> Result<()> {
        let Some(Excluded { offsets, ids }) = self.excluded else { return Ok(()) };
        check_csr(("exclude_offsets", offsets), ("exclude_ids", ids.0.len()), self.queries.rows())
    }
}

/// Offsets of `rows` rows into so many values: they start at 0, never fall, and end with the number of values.
pub(crate) fn check_csr(offsets: (&str, &[i64]), values: (&str, usize), rows: usize) -> Result<()> {
    let ((name, offsets), (values_name, len)) = (offsets, values);
    check_len(name, offsets.len(), rows + 1)?;
    if offsets[0] != 0 {
        return Err(value(format!("{name}[0]"), offsets[0], "0"));
    }
    if let Some(row) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
        return Err(value(format!("{name}[{}]", row + 1), offsets[row + 1], "not less than the one before"));
    }
    let end = offsets[rows];
    if end as u64 != len as u64 {
        return Err(shape(values_name, format!("{len} ids"), format!("the last offset, which is {end}")));
    }
    Ok(())
}

/// One value of each row's positive, taken from the pools.
fn gather<'a, T: Copy>(
    pools: &[Pool<'a>],
    positives: &[u32],
    field: impl Fn(&Pool<'a>) -> Option<&'a [T]>,
) -> Cow<'a, [T]> {
    let slices: Vec<&[T]> = pools.iter().filter_map(field).collect();
    let at = |index: u32| {
        let mut index = index as usize;
        slices.iter().find_map(|slice| {
            let found = slice.get(index).copied();
            index = index.wrapping_sub(slice.len());
            found
        })
    };
    positives.iter().filter_map(|&index| at(index)).collect()
}

/// `candidates` with one pool, `pools[2].candidates` with several.
fn pool_argument(pools: usize, pool: usize, field: &str) -> String {
    if pools == 1 { field.into() } else { format!("pools[{pool}].{field}") }
}

fn check_len(argument: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(shape(argument, format!("length {found}"), format!("length {expected}")))
}

fn check_all(argument: &str, values: &[f32], rule: &'static str, ok: impl Fn(f32) -> bool) -> Result<()> {
    match values.iter().position(|&v| !ok(v)) {
        Some(at) => Err(value(format!("{argument}[{at}]"), values[at], rule)),
        None => Ok(()),
    }
}
