// A torch.distributed backend on CPU memory that keeps NCCL's rules: see ordered_backend.py, which builds it.
//
// A communicator is a queue and one thread, as NCCL's is a stream: operations run in the order in which they were issued,
// a batch as one. Bytes travel through an inner gloo backend; a message's tag there is its number among those from one
// rank to another, so that they match by order whatever tags the caller gives. Includes are few because they are what
// compiling this costs.

#include <pybind11/chrono.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <deque>
#include <functional>
#include <map>
#include <sstream>
#include <thread>

namespace py = pybind11;
using c10::intrusive_ptr;
using Ms = std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
using Tensors = std::vector<at::Tensor>;
using WorkPtr = intrusive_ptr<c10d::Work>;

PYBIND11_DECLARE_HOLDER_TYPE(T, c10::intrusive_ptr<T>, true)

namespace {

constexpr size_t kMostInBatch = 256;
constexpr const char* kFirst = "first";
constexpr const char* kWhyFirst = "the first operation of a communicator must involve all of its ranks";

// Of this process, not of a communicator: NCCL's operations must come in one order over all of them.
std::mutex rules_mutex;
std::thread::id issuer;
std::atomic<int64_t> delay_ms{0};
std::atomic<int64_t> communicators{0};
py::object* observer = nullptr;
std::atomic<bool> observed{false};
std::atomic<bool> silent{false};
Tensors kept;

struct Part {  // One tensor of an operation.
  std::string what;
  at::Tensor tensor;
  int peer;  // -1 in collectives.
  bool writes;
  int64_t number;  // Of this message, among those that go the same way.
};

std::string describe(const std::vector<Part>& parts) {
  std::ostringstream text;
  for (const auto& part : parts) {
    text << (&part == &parts[0] ? "" : ", ") << part.what;
    if (part.peer < 0) continue;
    text << " rank " << part.peer << " (message " << part.number << ", " << part.tensor.nbytes() << " bytes)";
  }
  return text.str();
}

class OrderedWork : public c10d::Work {
 public:
  OrderedWork(int rank, c10d::OpType type, int64_t communicator, int64_t number, std::vector<Part> parts)
      : Work(rank, type), communicator_(communicator), number_(number), parts_(std::move(parts)) {}

  // As NCCL's: again and again, from any stream. Here it also blocks the host, whose streams run at once.
  bool wait(Ms) override {
    std::unique_lock<std::mutex> lock(mutex_);
    cv_.wait(lock, [&] { return completed_; });
    auto error = exception_;
    lock.unlock();
    if (error) std::rethrow_exception(error);
    tell("waited", [&] { return py::make_tuple(communicator_, number_); });
    return true;
  }

  void synchronize() override { wait(Ms(0)); }

  void tell_issued() {
    {
      // While somebody looks, memory that was sent or received is not used again for something else.
      std::lock_guard<std::mutex> lock(rules_mutex);
      if (observed)
        for (const auto& part : parts_) kept.push_back(part.tensor);
    }
    tell("issued", [&] {
      py::list parts;
      for (const auto& [what, tensor, peer, writes, number] : parts_)
        parts.append(py::make_tuple(what, writes, reinterpret_cast<int64_t>(tensor.data_ptr()), tensor.nbytes()));
      return py::make_tuple(communicator_, number_, parts);
    });
  }

  void complete(std::exception_ptr error) { finish(error); }
  const std::vector<Part>& parts() const { return parts_; }
  uint64_t getSequencenumber() const override { return number_; }

 private:
  template <typename F>
  void tell(const char* name, F arguments) {
    if (!observed) return;
    py::gil_scoped_acquire gil;
    if (observed) observer->attr(name)(*arguments());
  }

  const int64_t communicator_, number_;
  const std::vector<Part> parts_;
};

using Works = std::vector<WorkPtr>;

struct Job {
  intrusive_ptr<OrderedWork> work;
  std::function<Works()> start;
};

class OrderedBackend : public c10d::Backend {
 public:
  OrderedBackend(py::object connect, intrusive_ptr<c10d::Store> store, int rank, int size, Ms timeout)
      : Backend(rank, size),
        connect_(std::move(connect)),
        store_(std::move(store)),
        options_(c10::make_intrusive<Options>("nccl", timeout)) {
    runner_ = std::thread([this] { run(); });
  }

  ~OrderedBackend() override {
    stop(false);
    connect_.release();  // Without the GIL, which nobody has any more when the process ends.
  }

  const std::string getBackendName() const override { return "nccl"; }
  bool supportsSplitting() const override { return true; }
  bool supportsCoalescing() const override { return true; }
  intrusive_ptr<Options> getBackendOptions() override { return options_; }
  void setTimeout(Ms timeout) override { options_->timeout = timeout; }
  void abort() override { stop(true); }
  void shutdown() override { stop(false); }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return issued_; }

  void startCoalescing() override {
    TORCH_CHECK(!coalescing_, "ordered: startCoalescing inside a batch");
    coalescing_ = true;
  }

  WorkPtr endCoalescing() override {
    coalescing_ = false;
    auto parts = std::move(batch_);
    batch_.clear();
    TORCH_CHECK(
        parts.size() <= kMostInBatch,
        "ordered: ", parts.size(), " operations in one batch; NCCL can hang with more than ", kMostInBatch);
    if (parts.empty()) return nullptr;
    meet_first();
    return enqueue(c10d::OpType::COALESCED, std::move(parts));
  }

  WorkPtr send(Tensors& tensors, int peer, int) override { return p2p(tensors, peer, false); }
  WorkPtr recv(Tensors& tensors, int peer, int) override { return p2p(tensors, peer, true); }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& o) override {
    auto start = [=, this]() mutable { return inner_->broadcast(tensors, o); };
    if (o.rootRank == rank_) return collective(c10d::OpType::BROADCAST, "broadcast", tensors, {}, start);
    return collective(c10d::OpType::BROADCAST, "broadcast", {}, tensors, start);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& o) override {
    auto start = [=, this]() mutable { return inner_->allreduce(tensors, o); };
    return collective(c10d::OpType::ALLREDUCE, "all-reduce", {}, tensors, start);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& o) override {
    auto start = [=, this]() mutable { return inner_->reduce(tensors, o); };
    return collective(c10d::OpType::REDUCE, "reduce", {}, tensors, start);
  }
  WorkPtr allgather(std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    auto start = [=, this]() mutable { return inner_->allgather(out, in, o); };
    return collective(c10d::OpType::ALLGATHER, "all-gather", in, out.at(0), start);
  }
  WorkPtr _allgather_base(at::Tensor& out, at::Tensor& in, const c10d::AllgatherOptions& o) override {
    auto start = [=, this]() mutable { return inner_->_allgather_base(out, in, o); };
    return collective(c10d::OpType::_ALLGATHER_BASE, "all-gather", {in}, {out}, start);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& out, at::Tensor& in, const c10d::ReduceScatterOptions& o) override {
    auto start = [=, this]() mutable { return inner_->_reduce_scatter_base(out, in, o); };
    return collective(c10d::OpType::_REDUCE_SCATTER_BASE, "reduce-scatter", {in}, {out}, start);
  }
  WorkPtr barrier(const c10d::BarrierOptions& o) override {
    auto start = [=, this]() mutable { return inner_->barrier(o); };
    return collective(c10d::OpType::BARRIER, "barrier", {}, {}, start);
  }

  // The communicator that this one is split off from, all of whose ranks have to enter the split.
  void splitsFrom(intrusive_ptr<OrderedBackend> parent) { parent_ = std::move(parent); }

  // What torch calls on a new group of a bound world: with NCCL the moment of ncclCommSplit.
  void eagerConnectSingleDevice(at::Device) override {
    if (parent_) {
      parent_->enter_split();
      connect();
    } else {
      meet(kFirst, kWhyFirst);
    }
    met_ = true;
  }

  void enter_split() {
    meet(
        "split/" + std::to_string(splits_++),
        "a communicator is split, a collective of all ranks of the one it is split from");
  }

 private:
  WorkPtr p2p(Tensors& tensors, int peer, bool receives) {
    TORCH_CHECK(tensors.size() == 1 && peer >= 0 && peer < size_, "ordered: one tensor, and a rank of the group, not ", peer);
    check(tensors[0]);
    one_thread();
    if (!coalescing_ && peer == rank_) TORCH_CHECK(false, "ordered: to oneself only in a batch");
    auto& count = receives ? received_[peer] : sent_[peer];
    Part part{receives ? "receiving from" : "sending to", tensors[0], peer, receives, count++};
    if (!coalescing_) return enqueue(receives ? c10d::OpType::RECV : c10d::OpType::SEND, {part});
    batch_.push_back(part);
    return nullptr;
  }

  template <typename F>
  WorkPtr collective(
      c10d::OpType type, const char* name, Tensors in, Tensors out, F start) {
    TORCH_CHECK(!coalescing_, "ordered: ", name, " inside a batch");
    std::vector<Part> parts;
    for (auto& tensor : in) parts.push_back({name, tensor, -1, false, 0});
    for (auto& tensor : out) parts.push_back({name, tensor, -1, true, 0});
    for (auto& part : parts) check(part.tensor);
    meet_first();
    return post(type, std::move(parts), [start]() mutable { return Works{start()}; });
  }

  void check(const at::Tensor& tensor) {
    auto type = tensor.scalar_type();
    TORCH_CHECK(tensor.is_contiguous(), "ordered: tensors must be contiguous");
    TORCH_CHECK(type != at::kShort && !c10::isComplexType(type), "ordered: NCCL has no ", c10::toString(type));
  }

  WorkPtr enqueue(c10d::OpType type, std::vector<Part> parts) {
    // Messages to oneself meet inside a batch, the first sent with the first received.
    Tensors from, to;
    for (auto& part : parts)
      if (part.peer == rank_) (part.writes ? to : from).push_back(part.tensor);
    bool paired = from.size() == to.size();
    for (size_t i = 0; paired && i < from.size(); ++i) paired = from[i].nbytes() == to[i].nbytes();
    TORCH_CHECK(paired, "ordered: messages to oneself that do not meet in their batch hang: ", describe(parts));
    return post(type, parts, [this, parts, from, to]() mutable { return start_all(parts, from, to); });
  }

  Works start_all(std::vector<Part>& parts, Tensors& from, Tensors& to) {
    Works works;
    for (size_t i = 0; i < from.size(); ++i) std::memmove(to[i].data_ptr(), from[i].data_ptr(), from[i].nbytes());
    for (bool receives : {true, false})
      for (auto& part : parts) {
        if (part.writes != receives || part.peer == rank_) continue;
        Tensors one{part.tensor};
        // With its size in the tag a message of another size is no match and so a hang, as with NCCL.
        int tag = static_cast<int>((part.number & 0x7fff) << 16 | (part.tensor.nbytes() & 0xffff));
        works.push_back(receives ? inner_->recv(one, part.peer, tag) : inner_->send(one, part.peer, tag));
      }
    return works;
  }

  WorkPtr post(c10d::OpType type, std::vector<Part> parts, std::function<Works()> start) {
    one_thread();
    auto work = c10::make_intrusive<OrderedWork>(rank_, type, communicator_, issued_++, std::move(parts));
    work->tell_issued();
    std::deque<Job> over;  // Tensors go here, on the caller's thread: the runner must never need the GIL.
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over.swap(over_);
      jobs_.push_back({work, std::move(start)});
    }
    wake_.notify_one();
    return work;
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
      if (stopping_) break;
      Job job = std::move(jobs_.front());
      jobs_.pop_front();
      busy_with_ = job.work;
      lock.unlock();
      auto error = carry_out(job);
      lock.lock();
      if (abandoned_) return;
      finish(*job.work, error);
      busy_with_.reset();
      over_.push_back(std::move(job));
    }
    ended_ = true;
    wake_.notify_all();
  }

  std::exception_ptr carry_out(Job& job) {
    if (broken_) return broken_;
    try {
      if (delay_ms > 0) std::this_thread::sleep_for(Ms(delay_ms));
      auto deadline = Clock::now() + options_->timeout;
      Works works = job.start();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        current_ = works;
        TORCH_CHECK(!stopping_, "aborted");
      }
      for (auto& work : works) {
        auto left = std::chrono::duration_cast<Ms>(deadline - Clock::now());
        TORCH_CHECK(work->wait(std::max(left, Ms(1))) && !stopping_, "aborted");
      }
    } catch (const std::exception& error) {
      bool late = std::string(error.what()).find("imed out") != std::string::npos;
      std::ostringstream text;
      text << "ordered: rank " << rank_ << ", operation " << job.work->getSequencenumber() << ": " << describe(job.work->parts())
           << (late ? ": timed out; a peer has not come to it, or in another order or with other sizes (NCCL hangs)"
                    : ": connection lost: ")
           << (late ? "" : error.what());
      // torch's watchdog takes the process down; here all that follows on this communicator fails.
      broken_ = std::make_exception_ptr(std::runtime_error(text.str()));
      if (silent && !late && !stopping_) {
        // A kernel that waits for a rank of this host learns nothing of its death.
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stopping_.load(); });
      }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    over_works_.insert(over_works_.end(), current_.begin(), current_.end());
    current_.clear();
    return broken_;
  }

  // With `aborts`, as ncclCommAbort: what had not come counts as complete all the same, without an error and with garbage.
  void stop(bool aborts) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      aborted_ = aborted_ || aborts;
      stopping_ = true;
      for (auto& work : current_) {
        try {
          work->abort();
        } catch (const std::exception&) {
        }
      }
    }
    wake_.notify_all();
    if (!runner_.joinable()) return;
    if (PyGILState_Check()) {
      py::gil_scoped_release release;  // gloo's threads may need it to drop tensors.
      await_runner(aborts);
    } else {
      await_runner(aborts);
    }
    auto error = std::make_exception_ptr(std::runtime_error("ordered: the communicator was destroyed"));
    std::lock_guard<std::mutex> lock(mutex_);
    if (abandoned_) finish(*busy_with_, error);
    for (auto& job : jobs_) finish(*job.work, error);
    jobs_.clear();
    // gloo may wait for ever for what it has begun, as it frees its connections.
    if (aborted_ && inner_) inner_.release();
  }

  void await_runner(bool aborts) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      // gloo does not let go of a collective of which a rank has died; NCCL does.
      abandoned_ = aborts && !wake_.wait_for(lock, std::chrono::seconds(1), [&] { return ended_; });
    }
    if (!abandoned_) return runner_.join();
    c10::raw::intrusive_ptr::incref(this);  // The thread goes on for some time.
    runner_.detach();
  }

  void finish(OrderedWork& work, std::exception_ptr error) {
    if (!aborted_ || !error) return work.complete(error);
    for (const auto& part : work.parts())
      if (part.writes) std::memset(part.tensor.data_ptr(), 0xff, part.tensor.nbytes());
    work.complete(nullptr);
  }

  void one_thread() {
    std::lock_guard<std::mutex> lock(rules_mutex);
    if (issuer == std::thread::id()) issuer = std::this_thread::get_id();
    TORCH_CHECK(
        issuer == std::this_thread::get_id(),
        "ordered: operations from two threads of this process, whose order may differ between ranks (NCCL hangs)");
  }

  // NCCL builds a communicator inside its first operation, and that takes all of its ranks.
  void meet_first() {
    one_thread();
    if (met_) return;
    meet(kFirst, kWhyFirst);
    met_ = true;
  }

  void meet(const std::string& key, const char* why) {
    if (store_->add(key, 1) == size_) store_->set(key + "/all", std::vector<uint8_t>{1});
    try {
      store_->wait({key + "/all"}, options_->timeout);
    } catch (const std::exception&) {
      auto came = store_->add(key, 0);
      TORCH_CHECK(
          false, "ordered: rank ", rank_, ": timed out: ", why, ", and only ", came, " of ", size_, " have come (NCCL hangs)");
    }
    connect();
  }

  // As with NCCL, a communicator connects its ranks when it is made, and not when the process group is.
  void connect() {
    if (inner_) return;
    py::gil_scoped_acquire gil;
    inner_ = connect_().cast<intrusive_ptr<c10d::Backend>>();
    connect_ = py::object();
  }

  py::object connect_;
  intrusive_ptr<c10d::Backend> inner_;
  const intrusive_ptr<c10d::Store> store_;
  const intrusive_ptr<Options> options_;
  const int64_t communicator_ = communicators++;
  intrusive_ptr<OrderedBackend> parent_;
  int64_t issued_ = 0, splits_ = 0;
  bool coalescing_ = false, met_ = false;
  std::vector<Part> batch_;
  std::map<int, int64_t> sent_, received_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> stopping_{false}, aborted_{false};
  bool ended_ = false, abandoned_ = false;
  intrusive_ptr<OrderedWork> busy_with_;
  std::deque<Job> jobs_, over_;
  Works current_, over_works_;
  std::exception_ptr broken_;
  std::thread runner_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<OrderedBackend, c10d::Backend, intrusive_ptr<OrderedBackend>>(m, "OrderedBackend")
      .def(
          py::init([](py::object connect, intrusive_ptr<c10d::Store> store, int rank, int size, Ms limit) {
            return c10::make_intrusive<OrderedBackend>(std::move(connect), std::move(store), rank, size, limit);
          }))
      .def_property_readonly("options", &OrderedBackend::getBackendOptions)
      .def("splits_from", &OrderedBackend::splitsFrom)
      .def("perform_nocolor_split", [](OrderedBackend& self, const py::object&) {
        py::gil_scoped_release release;
        self.enter_split();
      });
  m.def("observe", [](py::object given) {
    delete observer;
    observer = new py::object(std::move(given));
    observed = !observer->is_none();
    kept.clear();
  });
  m.def("delay", [](double seconds) { delay_ms = static_cast<int64_t>(seconds * 1000); });
  m.def("silence", [](bool given) { silent = given; });
  m.def("forget_thread", [] { issuer = std::thread::id(); });
}
