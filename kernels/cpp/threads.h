// A small pool of threads: tasks of one parallel region, handed out one by one.
//
// The caller takes tasks itself and waits only for workers that have begun one, so a region never
// waits for a thread that the system has not scheduled. Between regions a worker spins briefly,
// then sleeps. One region runs at a time: a caller that finds the pool taken, by another thread of
// this process, runs all its tasks itself. Who runs a task changes no result.

#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quorum {

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#else
    asm volatile("yield");
#endif
}

// Waits until x is no longer `value`: spins for some microseconds, then sleeps.
inline void wait_while(const std::atomic<uint32_t> &x, uint32_t value) {
    using clock = std::chrono::steady_clock;
    const auto stop = clock::now() + std::chrono::microseconds(50);
    do {
        for (int i = 0; i < 32; i++) {
            if (x.load(std::memory_order_acquire) != value) return;
            pause_briefly();
        }
    } while (clock::now() < stop);
    while (x.load(std::memory_order_acquire) == value) x.wait(value);
}

class Pool {
  public:
    // The process's pool. A forked child, which has none of its parent's threads, gets a new one.
    static Pool &get() {
        static const int once = pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
        (void)once;
        return *current();
    }

    // Runs run(context, i) for i in [0, n), n > 1, on up to `threads` > 1 threads.
    void run(int64_t n, int threads, void (*run)(void *, int64_t), void *context) {
        std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
        if (!lock) {
            for (int64_t i = 0; i < n; i++) run(context, i);
            return;
        }
        while (workers_ < threads - 1) {
            std::thread(&Pool::work, this, workers_).detach();
            workers_++;
        }
        run_ = run, context_ = context, n_ = n, helpers_ = threads - 1;
        next_.store(0, std::memory_order_relaxed);
        open_.store(true);
        region_.fetch_add(1);
        region_.notify_all();
        take_tasks();
        open_.store(false);
        for (uint32_t inside; (inside = inside_.load()) != 0;) wait_while(inside_, inside);
    }

  private:
    static Pool *&current() {
        static Pool *pool = new Pool;  // never destroyed: its threads end with the process
        return pool;
    }
    void take_tasks() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;)
            run_(context_, i);
    }
    void work(int index) {
        for (uint32_t seen = 0;;) {
            wait_while(region_, seen);
            seen = region_.load();
            // The caller closes the region, then waits for `inside_` to be 0: whoever has come in
            // before it looked is waited for, whoever comes later finds the region closed.
            inside_.fetch_add(1);
            if (open_.load() && index < helpers_) take_tasks();
            if (inside_.fetch_sub(1) == 1) inside_.notify_all();
        }
    }

    std::mutex busy_;
    int workers_ = 0;
    void (*run_)(void *, int64_t) = nullptr;
    void *context_ = nullptr;
    int64_t n_ = 0;
    int helpers_ = 0;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint32_t> region_{0};
    std::atomic<bool> open_{false};
    alignas(64) std::atomic<uint32_t> inside_{0};
};

// Runs block(first, last) for all blocks of `grain` numbers of [0, n), on `threads` threads.
template <class F>
void parallel_blocks(int64_t n, int64_t grain, int64_t threads, F block) {
    struct Context {
        F &block;
        int64_t n, grain;
    } context{block, n, grain};
    const auto run = [](void *given, int64_t i) {
        const Context &c = *(Context *)given;
        c.block(i * c.grain, std::min(c.n, (i + 1) * c.grain));
    };
    const int64_t blocks = (n + grain - 1) / grain;
    if (threads <= 1 || blocks <= 1)
        for (int64_t i = 0; i < blocks; i++) run(&context, i);
    else Pool::get().run(blocks, (int)threads, run, &context);
}
// Runs task(i) for i in [0, n) on `threads` threads, `grain` at a time.
template <class F>
void parallel(int64_t n, int64_t grain, int64_t threads, F task) {
    parallel_blocks(n, grain, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) task(i);
    });
}

}  // namespace quorum
