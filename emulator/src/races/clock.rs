//! Vector clocks: what a thread knows to have happened.
//!
//! An actor is a warp, or something that works on its own: the copies that complete on one mbarrier, the wgmmas of a
//! warpgroup. Each counts epochs of its own. All lanes of a warp share the warp's counter, but each lane's progress is
//! known separately: lane 0 may tell others what it did without telling what lane 5 did.
use std::sync::Arc;

/// How much of one actor's doings is known.
#[derive(Clone, Default)]
struct View {
    /// All lanes up to this epoch, it included.
    all: u32,
    /// Lanes of which more is known than that; never less than `all`.
    lanes: Option<Arc<[u32; 32]>>,
}

impl View {
    fn at(&self, lane: usize) -> u32 {
        self.lanes.as_ref().map_or(self.all, |lanes| lanes[lane])
    }

    fn knows(&self, lanes: u32, epoch: u32) -> bool {
        if self.all >= epoch {
            return true;
        }
        let Some(known) = &self.lanes else { return false };
        (0..32).all(|lane| lanes >> lane & 1 == 0 || known[lane] >= epoch)
    }

    fn covers(&self, other: &View) -> bool {
        match (&self.lanes, &other.lanes) {
            (_, None) if self.all >= other.all => true,
            (None, None) => false,
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => true,
            _ => (0..32).all(|lane| self.at(lane) >= other.at(lane)),
        }
    }

    fn join(&mut self, other: &View) {
        if self.covers(other) {
            return;
        }
        if other.covers(self) {
            *self = other.clone();
            return;
        }
        let lanes = std::array::from_fn(|lane| self.at(lane).max(other.at(lane)));
        self.set(self.all.max(other.all), lanes);
    }

    fn set(&mut self, all: u32, lanes: [u32; 32]) {
        let least = lanes.into_iter().min().unwrap_or(0);
        let same = lanes.into_iter().all(|epoch| epoch == least);
        self.all = all.max(least);
        self.lanes = (!same).then(|| Arc::new(lanes));
    }

    fn raise(&mut self, lanes: u32, epoch: u32) {
        if !self.knows(lanes, epoch) {
            let raised =
                std::array::from_fn(
                    |lane| if lanes >> lane & 1 != 0 { self.at(lane).max(epoch) } else { self.at(lane) },
                );
            self.set(self.all, raised);
        }
    }
}

/// What is known of every actor, cluster by cluster: few kernels let clusters tell each other anything.
#[derive(Clone, Default)]
pub struct Clock {
    parts: Vec<(u32, Arc<Vec<View>>)>,
}

impl Clock {
    /// Whether what these lanes of an actor did in that epoch is known to have happened.
    pub fn knows(&self, cluster: u32, actor: u16, lanes: u32, epoch: u32) -> bool {
        self.part(cluster).and_then(|views| views.get(actor as usize)).is_some_and(|view| view.knows(lanes, epoch))
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    pub fn raise(&mut self, cluster: u32, actor: u16, lanes: u32, epoch: u32) {
        let at = self.parts.iter().position(|(number, _)| *number == cluster).unwrap_or_else(|| {
            self.parts.push((cluster, Arc::default()));
            self.parts.len() - 1
        });
        let views = Arc::make_mut(&mut self.parts[at].1);
        if views.len() <= actor as usize {
            views.resize(actor as usize + 1, View::default());
        }
        views[actor as usize].raise(lanes, epoch);
    }

    fn part(&self, cluster: u32) -> Option<&Arc<Vec<View>>> {
        self.parts.iter().find(|(number, _)| *number == cluster).map(|(_, views)| views)
    }

    fn covers(&self, other: &Clock) -> bool {
        other.parts.iter().all(|(cluster, theirs)| match self.part(*cluster) {
            Some(mine) => Arc::ptr_eq(mine, theirs) || all_covered(mine, theirs),
            None => false,
        })
    }

    fn join(&mut self, other: &Clock) {
        for (cluster, theirs) in &other.parts {
            let Some((_, mine)) = self.parts.iter_mut().find(|(number, _)| number == cluster) else {
                self.parts.push((*cluster, theirs.clone()));
                continue;
            };
            if Arc::ptr_eq(mine, theirs) || all_covered(mine, theirs) {
                continue;
            }
            if all_covered(theirs, mine) {
                *mine = theirs.clone();
                continue;
            }
            let views = Arc::make_mut(mine);
            if views.len() < theirs.len() {
                views.resize(theirs.len(), View::default());
            }
            views.iter_mut().zip(theirs.iter()).for_each(|(a, b)| a.join(b));
        }
    }
}

fn all_covered(by: &[View], views: &[View]) -> bool {
    let nothing = View::default();
    views.iter().enumerate().all(|(i, view)| by.get(i).unwrap_or(&nothing).covers(view))
}

/// The join of two clocks, without a new one where either will do.
pub fn joined(a: &Arc<Clock>, b: &Arc<Clock>) -> Arc<Clock> {
    if Arc::ptr_eq(a, b) || a.covers(b) {
        return a.clone();
    }
    if b.covers(a) {
        return b.clone();
    }
    let mut both = Clock::clone(a);
    both.join(b);
    Arc::new(both)
}

/// All that a thread hands on when it synchronises.
#[derive(Clone, Default)]
pub struct Knowledge {
    /// What happened before.
    pub seen: Arc<Clock>,
    /// Reads that have ended, beside those: by lanes that have exchanged values since, which they could only do when
    /// they had what they read. It says nothing of their writes.
    pub ended: Arc<Clock>,
    /// The part of `seen` that a fence.proxy.async has made visible to the asynchronous proxy.
    pub proxied: Arc<Clock>,
    /// The part of `seen` that a fence of the device's scope came after: a relaxed atomic publishes this much.
    pub fenced: Arc<Clock>,
    /// What relaxed atomics have read: seen after a fence, also by others that a barrier has told since.
    pub relaxed: Arc<Clock>,
}

impl Knowledge {
    pub fn joined(a: &Arc<Knowledge>, b: &Arc<Knowledge>) -> Arc<Knowledge> {
        if Arc::ptr_eq(a, b) {
            return a.clone();
        }
        let both = Knowledge {
            seen: joined(&a.seen, &b.seen),
            ended: joined(&a.ended, &b.ended),
            proxied: joined(&a.proxied, &b.proxied),
            fenced: joined(&a.fenced, &b.fenced),
            relaxed: joined(&a.relaxed, &b.relaxed),
        };
        match [a, b].into_iter().find(|k| both.is(k)) {
            Some(k) => k.clone(),
            None => Arc::new(both),
        }
    }

    fn is(&self, other: &Knowledge) -> bool {
        Arc::ptr_eq(&self.seen, &other.seen)
            && Arc::ptr_eq(&self.ended, &other.ended)
            && Arc::ptr_eq(&self.proxied, &other.proxied)
            && Arc::ptr_eq(&self.fenced, &other.fenced)
            && Arc::ptr_eq(&self.relaxed, &other.relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_known_one_by_one() {
        let mut clock = Clock::default();
        clock.raise(0, 3, 1 << 5, 7);
        assert!(clock.knows(0, 3, 1 << 5, 7) && !clock.knows(0, 3, 1 << 5, 8));
        assert!(!clock.knows(0, 3, 1 << 4, 1) && !clock.knows(0, 2, 1 << 5, 1) && !clock.knows(1, 3, 1 << 5, 1));
        clock.raise(0, 3, !(1 << 5), 4);
        assert!(clock.knows(0, 3, !0, 4) && !clock.knows(0, 3, !0, 5) && clock.knows(0, 3, 1 << 5, 7));
    }

    #[test]
    fn a_join_knows_what_either_knew() {
        let (mut a, mut b) = (Clock::default(), Clock::default());
        a.raise(0, 0, 1, 5);
        a.raise(0, 1, !0, 2);
        b.raise(0, 0, 2, 6);
        b.raise(4, 0, !0, 1);
        let (a, b) = (Arc::new(a), Arc::new(b));
        let both = joined(&a, &b);
        assert!(both.knows(0, 0, 1, 5) && both.knows(0, 0, 2, 6) && !both.knows(0, 0, 4, 1));
        assert!(both.knows(0, 1, !0, 2) && both.knows(4, 0, !0, 1));
        // What covers the other is taken as it is.
        assert!(Arc::ptr_eq(&joined(&both, &a), &both) && Arc::ptr_eq(&joined(&b, &both), &both));
    }
}
