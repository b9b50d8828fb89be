//! An owned problem: everything a batch borrows, with the loss. Tests, benches and examples make and keep these.

use catalog_softmax::{Batch, DType, Embeddings, Loss, Pool, Result, RowNegatives, Search, Table};
use half::{bf16, f16};

/// Owned elements of an embedding matrix.
#[derive(Debug, Clone)]
pub enum Storage {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Storage {
    /// Rounds `values` to `dtype`.
    pub fn new(values: &[f32], dtype: DType) -> Storage {
        match dtype {
            DType::F16 => Storage::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            DType::Bf16 => Storage::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            _ => Storage::F32(values.to_vec()),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Storage::F32(v) => v.len(),
            Storage::F16(v) => v.len(),
            Storage::Bf16(v) => v.len(),
        }
    }

    pub fn view(&self, dim: usize) -> Embeddings<'_> {
        self.strided_view(dim, 0)
    }

    /// A view of rows that lie `dim + padding` elements apart.
    pub fn strided_view(&self, dim: usize, padding: usize) -> Embeddings<'_> {
        let stride = dim + padding;
        let rows = self.len() / stride;
        match self {
            Storage::F32(v) => Embeddings::new(v, rows, dim),
            Storage::F16(v) => Embeddings::new(v, rows, dim),
            Storage::Bf16(v) => Embeddings::new(v, rows, dim),
        }
        .with_stride(stride)
    }

    /// The same rows with `padding` NaNs behind each: whoever reads them shows it.
    pub fn padded(&self, dim: usize, padding: usize) -> Storage {
        let rows = self.to_f32();
        let nan = std::iter::repeat_n(f32::NAN, padding);
        let values: Vec<f32> = rows.chunks(dim).flat_map(|row| row.iter().copied().chain(nan.clone())).collect();
        Storage::new(&values, self.dtype())
    }

    pub fn dtype(&self) -> DType {
        match self {
            Storage::F32(_) => DType::F32,
            Storage::F16(_) => DType::F16,
            Storage::Bf16(_) => DType::Bf16,
        }
    }

    /// Rewrites the elements through `f`, rounding to the element type.
    pub fn map(&self, f: impl FnOnce(&mut Vec<f32>)) -> Storage {
        let mut values = self.to_f32();
        f(&mut values);
        Storage::new(&values, self.dtype())
    }

    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Storage::F32(v) => v.clone(),
            Storage::F16(v) => v.iter().map(|v| v.to_f32()).collect(),
            Storage::Bf16(v) => v.iter().map(|v| v.to_f32()).collect(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct PoolData {
    /// Empty where the candidates are rows of the table.
    pub candidates: Storage,
    pub rows: Option<PoolRows>,
    pub ids: Option<Vec<u64>>,
    pub log_q: Option<Vec<f32>>,
    pub gradient: bool,
}

/// Which rows of the table a pool by reference holds.
#[derive(Debug, Clone)]
pub enum PoolRows {
    These(Vec<u32>),
    All,
}

/// All items' embeddings.
#[derive(Debug, Clone)]
pub struct TableData {
    pub embeddings: Storage,
    pub ids: Option<Vec<u64>>,
    pub gradient: bool,
}

impl TableData {
    pub fn new(embeddings: Storage) -> TableData {
        TableData { embeddings, ids: None, gradient: true }
    }

    /// The identity of a row's item.
    pub fn id(&self, row: usize) -> u64 {
        self.ids.as_ref().map_or(row as u64, |ids| ids[row])
    }
}

/// Negatives of each row's own (B, K); `RowNegatives::NONE` where there is none.
#[derive(Debug, Clone)]
pub struct RowNegativesData {
    pub rows: Vec<u32>,
    pub per_row: usize,
    pub log_q: Option<Vec<f32>>,
}

impl RowNegativesData {
    pub fn view(&self) -> RowNegatives<'_> {
        let view = RowNegatives::new(&self.rows, self.per_row);
        match &self.log_q {
            Some(log_q) => view.log_q(log_q),
            None => view,
        }
    }
}

#[derive(Debug, Clone)]
pub enum PositiveData {
    /// Indices over the candidates of all pools; rows of the table where there is one.
    Index(Vec<u32>),
    Separate(Storage),
}

/// Inputs of one step, owned. Fields are named as the builder's calls.
#[derive(Debug, Clone)]
pub struct Problem {
    pub dim: usize,
    pub queries: Storage,
    pub table: Option<TableData>,
    pub pools: Vec<PoolData>,
    pub row_negatives: Option<RowNegativesData>,
    pub positives: PositiveData,
    pub positive_offsets: Option<Vec<i64>>,
    pub positive_weight: Option<Vec<f32>>,
    pub positive_ids: Option<Vec<u64>>,
    pub positive_log_q: Option<Vec<f32>>,
    /// Offsets and ids.
    pub excluded: Option<(Vec<i64>, Vec<u64>)>,
    pub row_weight: Option<Vec<f32>>,
    pub loss: Loss,
}

impl Problem {
    pub fn num_queries(&self) -> usize {
        self.queries.len() / self.dim
    }

    pub fn num_candidates(&self) -> usize {
        self.pools.iter().map(|pool| self.pool_len(pool)).sum()
    }

    pub fn pool_len(&self, pool: &PoolData) -> usize {
        match &pool.rows {
            None => pool.candidates.len() / self.dim,
            Some(PoolRows::These(rows)) => rows.len(),
            Some(PoolRows::All) => self.table_rows(),
        }
    }

    /// M; 0 without a table.
    pub fn table_rows(&self) -> usize {
        self.table.as_ref().map_or(0, |table| table.embeddings.len() / self.dim)
    }

    /// P.
    pub fn num_pairs(&self) -> usize {
        match &self.positives {
            PositiveData::Index(index) => index.len(),
            PositiveData::Separate(embeddings) => embeddings.len() / self.dim,
        }
    }

    /// The pairs of a row.
    pub fn pairs(&self, row: usize) -> std::ops::Range<usize> {
        self.positive_offsets.as_ref().map_or(row..row + 1, |offsets| offsets[row] as usize..offsets[row + 1] as usize)
    }

    /// Whether it has what the ordinary problem lacks: a table, or other than one positive for each row, or a filter.
    pub fn is_ordinary(&self) -> bool {
        self.table.is_none() && self.positive_offsets.is_none() && self.loss.false_negatives.is_none()
    }

    pub fn batch(&self) -> Result<Batch<'_>> {
        self.strided_batch(0)
    }

    /// The same problem laid out for [`strided_batch`](Problem::strided_batch).
    pub fn padded(&self, padding: usize) -> Problem {
        let mut problem = self.clone();
        problem.queries = self.queries.padded(self.dim, padding);
        if let Some(table) = &mut problem.table {
            table.embeddings = table.embeddings.padded(self.dim, padding);
        }
        for pool in &mut problem.pools {
            pool.candidates = pool.candidates.padded(self.dim, padding);
        }
        if let PositiveData::Separate(embeddings) = &mut problem.positives {
            *embeddings = embeddings.padded(self.dim, padding);
        }
        problem
    }

    /// The batch of a problem whose rows have `padding` elements behind each.
    pub fn strided_batch(&self, padding: usize) -> Result<Batch<'_>> {
        self.batch_over(self.table.as_ref().map(|table| table_view(table, self.dim, padding)), padding)
    }

    /// The batch of a step that `Backend::update` or `Sharded` takes: it knows the shape of its table alone.
    pub fn update_batch(&self) -> Result<Batch<'_>> {
        let table = self.table.as_ref().expect("an update steps a table");
        let of_shape = Table::of_shape(self.table_rows(), self.dim, table.embeddings.dtype());
        let of_shape = match &table.ids {
            Some(ids) => of_shape.ids(ids),
            None => of_shape,
        };
        let of_shape = if table.gradient { of_shape } else { of_shape.without_gradient() };
        self.batch_over(Some(of_shape), 0)
    }

    fn batch_over<'a>(&'a self, table: Option<Table<'a>>, padding: usize) -> Result<Batch<'a>> {
        let mut pools = self.pools.iter().map(|data| pool_view(data, self.dim, padding));
        let queries = self.queries.strided_view(self.dim, padding);
        let mut builder = match table {
            Some(table) => Batch::of_table(queries, table),
            None => Batch::builder(queries, pools.next().expect("a problem without a table has a pool")),
        };
        for pool in pools {
            builder = builder.pool(pool);
        }
        if let Some(negatives) = &self.row_negatives {
            builder = builder.row_negatives(negatives.view());
        }
        if let Some(offsets) = &self.positive_offsets {
            builder = builder.positive_offsets(offsets);
        }
        if let Some(weight) = &self.positive_weight {
            builder = builder.positive_weight(weight);
        }
        builder = match &self.positives {
            PositiveData::Index(positives) => builder.positives(positives),
            PositiveData::Separate(embeddings) => {
                builder.positive_embeddings(embeddings.strided_view(self.dim, padding))
            }
        };
        if let Some(ids) = &self.positive_ids {
            builder = builder.positive_ids(ids);
        }
        if let Some(log_q) = &self.positive_log_q {
            builder = builder.positive_log_q(log_q);
        }
        if let Some((offsets, ids)) = &self.excluded {
            builder = builder.excluded_ids(offsets, ids);
        }
        if let Some(weight) = &self.row_weight {
            builder = builder.row_weight(weight);
        }
        builder.build()
    }

    /// A search of the same queries, candidates and exclusions.
    pub fn search(&self) -> Result<Search<'_>> {
        let mut pools = self.pools.iter().map(|data| {
            let pool = Pool::new(data.candidates.view(self.dim));
            match &data.ids {
                Some(ids) => pool.ids(ids),
                None => pool,
            }
        });
        let mut builder = Search::builder(self.queries.view(self.dim), pools.next().expect("a problem has a pool"));
        for pool in pools {
            builder = builder.pool(pool);
        }
        if let Some((offsets, ids)) = &self.excluded {
            builder = builder.excluded_ids(offsets, ids);
        }
        builder.build()
    }

    /// All candidates as `f32`, pool after pool.
    pub fn candidates(&self) -> Vec<f32> {
        self.pools.iter().flat_map(|pool| pool.candidates.to_f32()).collect()
    }

    /// The positives' embeddings as `f32` (B, D).
    pub fn positive_rows(&self) -> Vec<f32> {
        match &self.positives {
            PositiveData::Separate(embeddings) => embeddings.to_f32(),
            PositiveData::Index(index) => {
                let (candidates, d) = (self.candidates(), self.dim);
                index.iter().flat_map(|&j| candidates[j as usize * d..(j as usize + 1) * d].to_vec()).collect()
            }
        }
    }

    /// One direction of a symmetric loss: the sides swapped, each candidate's query its positive.
    pub fn swapped(&self) -> Problem {
        let PositiveData::Index(positives) = &self.positives else { panic!("a symmetric loss has indices") };
        let mut query_of = vec![0; positives.len()];
        for (row, &positive) in positives.iter().enumerate() {
            query_of[positive as usize] = row as u32;
        }
        let pool = &self.pools[0];
        let ids = pool.ids.as_ref().map(|ids| positives.iter().map(|&j| ids[j as usize]).collect());
        let weight = |w: &Vec<f32>| query_of.iter().map(|&row| w[row as usize]).collect();
        let mut loss = self.loss;
        loss.symmetric = false;
        Problem {
            dim: self.dim,
            queries: pool.candidates.clone(),
            table: None,
            pools: vec![PoolData { candidates: self.queries.clone(), rows: None, ids, log_q: None, gradient: true }],
            row_negatives: None,
            positive_offsets: None,
            positive_weight: None,
            row_weight: self.row_weight.as_ref().map(weight),
            positives: PositiveData::Index(query_of),
            positive_ids: None,
            positive_log_q: None,
            excluded: None,
            loss,
        }
    }
}

fn table_view(data: &TableData, dim: usize, padding: usize) -> Table<'_> {
    let mut table = Table::new(data.embeddings.strided_view(dim, padding));
    if let Some(ids) = &data.ids {
        table = table.ids(ids);
    }
    if data.gradient { table } else { table.without_gradient() }
}

fn pool_view(data: &PoolData, dim: usize, padding: usize) -> Pool<'_> {
    let mut pool = match &data.rows {
        None => Pool::new(data.candidates.strided_view(dim, padding)),
        Some(PoolRows::These(rows)) => Pool::rows(rows),
        Some(PoolRows::All) => Pool::whole_table(),
    };
    if let Some(ids) = &data.ids {
        pool = pool.ids(ids);
    }
    if let Some(log_q) = &data.log_q {
        pool = pool.log_q(log_q);
    }
    if data.gradient { pool } else { pool.without_gradient() }
}
