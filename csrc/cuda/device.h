// What the ops ask of CUDA besides launches.
#pragma once

namespace resfast::cuda {

// Makes a device current for as long as it lives, then the one before it again.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = -1;
};

// Of a device; 1 where CUDA does not say.
int processor_count(int device);

}  // namespace resfast::cuda
