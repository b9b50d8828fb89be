//! Gradients that are added to what the caller's memory holds: a step writes them into its workspace, and a last launch for each adds
//! them. So the sums of a step are those of one that overwrites, and what was there comes in by one addition.

use super::driver::Grid;
use super::few::Few;
use super::finish::{Back, TableRows, Totals};
use super::kernels::{ACCUMULATE, Variant};
use super::memory::{Base, Layout, Part};
use super::params::AccumulateParams;
use super::passes::Step;
use super::problem::{Problem, ProblemPositives};
use crate::error::Result;

/// Places in the workspace for the gradients of a step.
#[derive(Debug)]
pub(super) struct Fresh {
    d_queries: Part,
    /// Nothing for a pool without a gradient of its own.
    d_candidates: Few<Part, 2>,
    d_positive_embeddings: Part,
    /// Of the rows that the batch names; with `table_rows` absent, of all.
    d_table: Part,
    table_rows: Part,
    num_rows: Part,
    most_table_rows: usize,
    /// By tau, and by its logarithm.
    temperature: Part,
}

impl Fresh {
    pub(super) fn lay_out(layout: &mut Layout, problem: &Problem) -> Self {
        let dim = problem.dim;
        let own_gradient = |pool: &super::problem::ProblemPool| pool.gradient && !pool.of_table;
        let separate = matches!(problem.positives, ProblemPositives::Separate(_)) && !problem.positives_of_table();
        let most_table_rows = if problem.table_gradient { problem.most_table_rows() } else { 0 };
        let listed = most_table_rows > 0 && !problem.has_whole_table();
        Fresh {
            d_queries: layout.part(problem.num_queries() * dim, 4),
            d_candidates: problem
                .pools
                .iter()
                .map(|pool| layout.part_if(own_gradient(pool), pool.candidates.rows * dim, 4))
                .collect(),
            d_positive_embeddings: layout.part_if(separate, problem.pairs * dim, 4),
            d_table: layout.part(most_table_rows * dim, 4),
            table_rows: layout.part_if(listed, most_table_rows, 4),
            num_rows: layout.part_if(listed, 1, 8),
            most_table_rows,
            temperature: layout.part(2, 8),
        }
    }

    /// The places in the form of the caller's.
    pub(super) fn places(&self, base: Base, given: &Back, totals: &Totals) -> (Back, Totals) {
        let at = |part: Part| base.address(part);
        let table_rows = match at(self.table_rows) {
            0 => TableRows::All,
            rows => TableRows::Sparse { rows, num_rows: at(self.num_rows) },
        };
        let back = Back {
            d_queries: at(self.d_queries),
            d_positive_embeddings: at(self.d_positive_embeddings),
            d_candidates: self.d_candidates.iter().map(|&part| at(part)).collect(),
            d_table: at(self.d_table),
            table_rows,
            ..given.clone()
        };
        let temperature = at(self.temperature);
        (back, Totals { d_temperature: temperature, d_log_temperature: temperature + 8, ..*totals })
    }
}

impl Step<'_> {
    /// Adds all gradients of a step to those of the caller.
    pub(super) fn accumulate(&self, fresh: &Fresh, given: &Back, totals: &Totals) -> Result<()> {
        let (problem, dim) = (self.problem, self.problem.dim as u32);
        let (back, fresh_totals) = fresh.places(self.base, given, totals);
        let matrix = |to: u64, from: u64, rows: usize| AccumulateParams { to, from, count: rows as u64, dim, ..ZERO };
        let double = |to: u64, from: u64| AccumulateParams { to, from, count: 1, dim: 1, is_double: 1, ..ZERO };
        self.add(&matrix(given.d_queries, back.d_queries, problem.num_queries()))?;
        let pools = problem.pools.iter().zip(given.d_candidates.iter()).zip(back.d_candidates.iter());
        for ((pool, &to), &from) in pools {
            self.add(&matrix(to, from, pool.candidates.rows))?;
        }
        self.add(&matrix(given.d_positive_embeddings, back.d_positive_embeddings, problem.pairs))?;
        let table = matrix(given.d_table, back.d_table, fresh.most_table_rows);
        self.add(&match back.table_rows {
            TableRows::Sparse { rows, num_rows } => AccumulateParams { rows, num_rows, ..table },
            TableRows::All | TableRows::Listed(..) => table,
        })?;
        self.add(&double(totals.d_temperature, fresh_totals.d_temperature))?;
        self.add(&double(totals.d_log_temperature, fresh_totals.d_log_temperature))
    }

    /// Nothing where one of the two is not there.
    fn add(&self, params: &AccumulateParams) -> Result<()> {
        let elements = params.count as usize * params.dim as usize;
        if params.to == 0 || params.from == 0 || elements == 0 {
            return Ok(());
        }
        self.driver.launch(ACCUMULATE, Variant::ONLY, Grid::threads(elements), params)
    }
}

const ZERO: AccumulateParams =
    AccumulateParams { to: 0, from: 0, rows: 0, num_rows: 0, count: 0, dim: 0, is_double: 0 };
