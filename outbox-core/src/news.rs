//! What a store tells its workers without being asked.

use std::{
    collections::BTreeSet,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Poll, Waker},
};

/// What may have happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NewsItem {
    /// There may be something new to deliver for this subscription.
    Deliveries(i32),
    /// This subscription was paused, resumed or removed.
    State(i32),
    /// Anything, of any subscription: something was missed.
    Anything,
}

/// Where a worker reads the news of its store. It may miss something: look at the store from time to time.
#[derive(Debug)]
pub struct News(Arc<Mailbox>);

#[derive(Debug, Default)]
struct Mailbox(Mutex<Unread>);

#[derive(Debug, Default)]
struct Unread {
    items: BTreeSet<NewsItem>,
    reader: Option<Waker>,
}

impl Mailbox {
    fn unread(&self) -> MutexGuard<'_, Unread> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl News {
    /// Waits for news, and returns all that have come since the last time.
    ///
    /// # Cancel safety
    ///
    /// Safe: what was not returned is returned by the next call.
    pub async fn next(&mut self) -> BTreeSet<NewsItem> {
        poll_fn(|context| {
            let mut unread = self.0.unread();
            if unread.items.is_empty() {
                unread.reader = Some(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(std::mem::take(&mut unread.items))
        })
        .await
    }
}

/// Where a store announces its news. Everybody who has subscribed gets all of them.
#[derive(Debug, Default)]
pub struct Announcer(Mutex<Vec<Weak<Mailbox>>>);

impl Announcer {
    /// News from now on.
    pub fn subscribe(&self) -> News {
        let mailbox = Arc::default();
        let mut readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        readers.retain(|reader| reader.strong_count() > 0);
        readers.push(Arc::downgrade(&mailbox));
        News(mailbox)
    }

    /// Tells everybody.
    pub fn announce(&self, items: &[NewsItem]) {
        let readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for mailbox in readers.iter().filter_map(Weak::upgrade) {
            let reader = {
                let mut unread = mailbox.unread();
                unread.items.extend(items);
                unread.reader.take()
            };
            reader.into_iter().for_each(Waker::wake);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        task::{Context, Poll, Waker},
    };

    use super::*;

    fn read(news: &mut News) -> Option<Vec<NewsItem>> {
        match pin!(news.next()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(items) => Some(items.into_iter().collect()),
            Poll::Pending => None,
        }
    }

    #[test]
    fn everybody_gets_what_has_happened_since_the_last_time_once() {
        let announcer = Announcer::default();
        announcer.announce(&[NewsItem::Anything]);
        let (mut one, mut other) = (announcer.subscribe(), announcer.subscribe());
        assert_eq!(read(&mut one), None);
        announcer.announce(&[NewsItem::State(1), NewsItem::Deliveries(2)]);
        announcer.announce(&[NewsItem::Deliveries(2)]);
        assert_eq!(read(&mut one), Some(vec![NewsItem::Deliveries(2), NewsItem::State(1)]));
        assert_eq!(read(&mut one), None);
        drop(one);
        announcer.announce(&[NewsItem::Deliveries(3)]);
        assert_eq!(read(&mut other), Some(vec![NewsItem::Deliveries(2), NewsItem::Deliveries(3), NewsItem::State(1)]));
    }
}
